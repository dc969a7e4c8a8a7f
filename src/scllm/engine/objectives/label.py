"""Labels and values of cells, predicted from their embeddings."""

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
    """The weight of each loss, as a run directory holds it; an error where it is none."""
    if isinstance(loss, str) and loss not in get_args(LossName):
        raise ValueError(f"loss is {loss!r}, one of {get_args(LossName)} expected. Use loss='ce'.")
    weights = {loss: 1.0} if isinstance(loss, str) else loss
    check_loss(weights)
    return {name: float(weight) for name, weight in weights.items()}


def check_loss(loss: Mapping[LossName, float]) -> None:
    """Raise where losses are unknown, or their weights none."""
    known = get_args(LossName)
    if not isinstance(loss, Mapping):
        raise TypeError(f"loss is {loss!r}, one of {known} or a weight for each of several expected. Use loss='ce'.")
    if not loss or set(loss) - set(known):
        raise ValueError(f"loss is {dict(loss)}, names of {known} with weights expected. Use loss='ce'.")
    are_weights = all(isinstance(weight, Real) and 0 <= weight < math.inf for weight in loss.values())
    if not are_weights or not any(loss.values()):
        raise ValueError(
            f"loss is {dict(loss)}, weights of 0 or more expected, one above 0. Use loss={{'ce': 1.0, 'dice': 1.0}}."
        )


@dataclass(frozen=True)
class Label:
    """Predict ``obs`` columns from the cell embedding: the labels and values of the model's heads.

    ``batch.obs["label:<key>"]`` holds codes (-1: missing) or values (NaN: missing).

    Parameters
    ----------
    loss
        Weight of each loss on labels: ``"ce"``, ``"bce"``, ``"dice"``, ``"focal"``. Values get the squared error.
    class_weight
        By key, one weight a class.
    label_smoothing
        Share of the target spread over all classes (``"ce"`` only).
    """

    loss: Mapping[LossName, float] = field(default_factory=lambda: {"ce": 1.0})
    class_weight: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_loss(self.loss)
        if self.label_smoothing and not self.loss.get("ce"):
            raise TypeError(
                f"label_smoothing={self.label_smoothing} spreads the target of 'ce', and loss is {dict(self.loss)}, "
                "both or neither expected. Leave one out."
            )

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Summed over labelled cells and heads."""
        return self.of(model.head_specs, model.head_outputs(batch), batch.obs)

    def of(self, heads: Sequence[HeadSpec], outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Loss:
        """The loss of what heads say, summed over labelled cells and heads."""
        device = next(iter(outputs.values())).device
        total = torch.zeros((), device=device)
        count = torch.zeros((), dtype=torch.long, device=device)
        logged: dict[str, Tensor] = {}
        for spec in heads:
            target, predicted = targets[f"label:{spec.key}"], outputs[spec.key]
            there = target >= 0 if spec.classes is not None else target.isfinite()
            target, predicted = target[there], predicted[there]
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
                # a rank without labels takes part in the backward pass of the others
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
                    # does not add up over micro-batches: reported as its value times the cells
                    each = losses.dice(logits, label, weight) * len(label)
            total = total + factor * each
        return total

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Of each head the labelled cells, and its squared error, or its right answers and how often it gave each."""
        return tuple(
            f"{spec.key}:{what}"
            for spec in model.head_specs
            for what in ("n", *(["mse"] if spec.classes is None else ["accuracy", *range(spec.n_outputs)]))
        )

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Per labelled cell: accuracy and the share of the commonest answer, or the squared error, of each head.

        Of a head that no cell had a label for, nothing.
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
