"""Prediction of labels and values of cells from their embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from scllm.engine import losses
from scllm.engine.objectives.base import Loss
from scllm.models.base import Batch, CellModel, HeadSpec

__all__ = ["Label", "LossName", "check_loss", "loss_weights"]

LossName = Literal["ce", "bce", "dice", "focal"]


def loss_weights(loss: LossName | Mapping[LossName, float]) -> dict[LossName, float]:
    """Return the weight of each loss as plain data; raise an error if ``loss`` is invalid."""
    if isinstance(loss, str) and loss not in get_args(LossName):
        raise ValueError(f"Expected loss to be one of {get_args(LossName)}, got {loss!r}. Use loss='ce'.")
    weights = {loss: 1.0} if isinstance(loss, str) else loss
    check_loss(weights)
    return {name: float(weight) for name, weight in weights.items()}


def check_loss(loss: Mapping[LossName, float]) -> None:
    """Raise an error if losses are unknown or their weights are invalid."""
    known = get_args(LossName)
    if not isinstance(loss, Mapping):
        raise TypeError(
            f"Expected loss to be one of {known} or a dict from these names to weights, got {loss!r}. Use loss='ce'."
        )
    if not loss or set(loss) - set(known):
        raise ValueError(f"Expected loss to map names out of {known} to weights, got {dict(loss)}. Use loss='ce'.")
    are_weights = all(isinstance(weight, Real) and 0 <= weight < math.inf for weight in loss.values())
    if not are_weights or not any(loss.values()):
        raise ValueError(
            f"Expected weights of loss to be at least 0, with one above 0, got {dict(loss)}. "
            "Use loss={'ce': 1.0, 'dice': 1.0}."
        )


@dataclass(frozen=True)
class Label:
    """Predict ``obs`` columns from the cell embedding, with the model's heads for labels and values.

    ``batch.obs["label:<key>"]`` contains codes (-1: missing) or values (NaN: missing).

    Parameters
    ----------
    loss
        Weight of each loss for labels: ``"ce"``, ``"bce"``, ``"dice"``, ``"focal"``. Values use the squared error.
    class_weight
        Weight of each class, by key.
    label_smoothing
        Share of the target that is spread over all classes (only with ``"ce"``).
    """

    loss: Mapping[LossName, float] = field(default_factory=lambda: {"ce": 1.0})
    class_weight: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.label_smoothing and not self.loss.get("ce"):
            raise TypeError(
                f"label_smoothing={self.label_smoothing} needs the loss 'ce', got loss={dict(self.loss)}. Leave one of "
                "them out."
            )

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum the loss over labelled cells and heads."""
        return self.of(model.head_specs, model.head_outputs(batch), batch.obs)

    def of(self, heads: Sequence[HeadSpec], outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Loss:
        """Sum the loss of given head outputs over labelled cells and heads."""
        device = next(iter(outputs.values())).device
        total = torch.zeros((), device=device)
        count = torch.zeros((), dtype=torch.long, device=device)
        logged: dict[str, Tensor] = {}
        for spec in heads:
            target, predicted = targets[f"label:{spec.key}"], outputs[spec.key]
            labelled = target >= 0 if spec.classes is not None else target.isfinite()
            target, predicted = target[labelled], predicted[labelled]
            if spec.classes is None:
                error = losses.squared_error(predicted.squeeze(1), (target - spec.mean) / spec.std)
                total = total + error
                logged[f"{spec.key}:mse"] = error
            elif len(target):
                total = total + self._labels(predicted, target, spec.key)
                answers = predicted.argmax(1)
                logged[f"{spec.key}:accuracy"] = (answers == target).sum()
                given = torch.bincount(answers, minlength=spec.n_outputs)
                logged |= {f"{spec.key}:{code}": n for code, n in enumerate(given)}
            else:
                # a rank without labels must take part in the backward pass of the others
                total = total + 0 * predicted.sum()
            logged[f"{spec.key}:n"] = torch.tensor(len(target), device=device)
            count = count + len(target)
        return Loss(total, count, logged)

    def _labels(self, logits: Tensor, label: Tensor, key: str) -> Tensor:
        weight = torch.tensor(self.class_weight[key], device=logits.device) if key in self.class_weight else None
        total = torch.zeros((), device=logits.device)
        for name, factor in self.loss.items():
            match name:
                case "ce":
                    each = losses.cross_entropy(logits, label, weight, self.label_smoothing).sum()
                case "bce":
                    each = losses.binary_cross_entropy(logits, label, weight).sum()
                case "focal":
                    each = losses.focal(logits, label, weight).sum()
                case "dice":
                    # does not add up over micro-batches, so its value is multiplied by the number of cells
                    each = losses.dice(logits, label, weight) * len(label)
            total = total + factor * each
        return total

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log labelled cells of each head, and its squared error, or correct predictions and counts of each class."""
        return tuple(
            f"{spec.key}:{what}"
            for spec in model.head_specs
            for what in ("n", *(["mse"] if spec.classes is None else ["accuracy", *range(spec.n_outputs)]))
        )

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the accuracy and the share of the most frequent prediction, or the squared error, of each head.

        These are means over labelled cells; heads without labelled cells are not reported.
        """
        by_head: dict[str, dict[str, float]] = {}
        for name, mean in means.items():
            key, _, what = name.rpartition(":")
            by_head.setdefault(key, {})[what] = mean
        reported = by_head.pop("")
        for key, of_head in by_head.items():
            share, suffix = of_head.pop("n"), f"_{key}" if len(by_head) > 1 else ""
            if not share:
                continue
            if "mse" in of_head:
                reported[f"mse{suffix}"] = of_head["mse"] / share
            else:
                reported[f"accuracy{suffix}"] = of_head.pop("accuracy") / share
                reported[f"commonest_answer{suffix}"] = max(of_head.values()) / share
        return reported
