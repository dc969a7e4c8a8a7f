"""What a model is trained for. An objective is called with model, batch and step, and gives a sum and a count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from scllm.engine import losses
from scllm.kernels.draws import mix
from scllm.models.base import Batch, CellModel

__all__ = ["Label", "LossName", "Loss", "MaskedValue", "Objective", "objective_from_dict", "objective_to_dict"]

# draws of one cell for different purposes are independent
_OUT, _ABSENT = 5, 6

LossName = Literal["ce", "bce", "dice", "focal"]


@dataclass
class Loss:
    """What one micro-batch contributes.

    Parameters
    ----------
    sum
        Loss summed over what counts; gradients are taken of this.
    count
        How many counted: hidden genes, labelled cells. The loss of a step is all sums over all counts.
    logged
        Sums that are divided by the same count and written to the history.
    """

    sum: Tensor
    count: Tensor
    logged: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training task. Draws are a function of ``batch.keys`` and the step."""

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """The loss of a micro-batch."""
        ...

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Names of what is logged, the same on ranks that have no cells."""
        ...

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """What the history holds, from the means of what was logged."""
        ...


@dataclass(frozen=True)
class MaskedValue:
    """Hide values and predict them, from the genes' states and from the cell embedding (scGPT).

    Parameters
    ----------
    mask_ratio
        Shares of a cell's genes to hide; one is drawn a step. ``<cls>`` is never hidden.
    from_cell
        Weight of the error of the values predicted from the cell embedding.
    left_out
        Share of each cell's genes that are left out of the sentence altogether. From the cell embedding their values
        are predicted too, and those of as many genes drawn at random, most of them zero: so the embedding has to say
        which genes a cell expresses, not only how much. 0 is scGPT's own training.
    seed
        What the ratio is drawn by, together with the step.
    """

    mask_ratio: tuple[float, ...] = (0.25, 0.5, 0.75)
    from_cell: float = 1.0
    left_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.mask_ratio or not all(0 < ratio < 1 for ratio in self.mask_ratio):
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}, shares between 0 and 1 expected. scGPT uses (0.25, 0.5, 0.75)."
            )
        if not 0 <= self.left_out < 1:
            raise ValueError(f"left_out is {self.left_out}, a share from 0 up to below 1 expected. 0 leaves none out.")

    def ratio(self, step: int) -> float:
        """The share hidden at a step."""
        return self.mask_ratio[int(mix(self.seed, step) % len(self.mask_ratio))]

    def hide(self, batch: Batch, is_special: Tensor, ratio: float, salt: int = 0) -> Tensor:
        """Positions of hidden tokens: in each cell the ``floor(ratio * genes)`` with the smallest draws."""
        special = is_special[batch.genes]
        cell = batch.cell
        draws = uniform(batch.keys[cell], batch.genes, salt)
        # specials go last in their cell and are not among the genes that are counted
        order = torch.argsort(cell + torch.where(special, 1 - 2**-40, draws * (1 - 2**-30)))
        place = torch.arange(len(cell), device=cell.device) - batch.first[cell]
        n_genes = torch.bincount(cell[~special], minlength=batch.n_cells)
        n_hidden = (n_genes.double() * ratio).floor().long()
        return order[place < n_hidden[cell]].sort().values

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Squared errors over the hidden positions, and from the cell embedding over what was left out too."""
        assert batch.values is not None
        everything, out = batch, None
        if self.left_out:
            out = self.hide(batch, model.is_special, self.left_out, _OUT)
            n_out = torch.bincount(batch.cell[out], minlength=batch.n_cells).tolist()
            batch = batch.without(out, n_out)
        hidden = self.hide(batch, model.is_special, self.ratio(step))
        target = batch.values[hidden]
        shown = batch.with_values(batch.values.index_fill(0, hidden, model.config.mask_value))
        states = model.hidden(shown)
        cell_of = batch.cell[hidden]
        predicted = model.decode(states[hidden], cell_of, batch)
        logged = {"mse": losses.squared_error(predicted["value"], target)}
        if "zero" in predicted:
            logged["zero"] = losses.zero_likelihood(predicted["zero"], target)
        if self.from_cell:
            asked = batch.genes[hidden], cell_of, target
            if out is not None:
                asked = tuple(
                    map(torch.cat, zip(asked, self._left_out(everything, out, len(model.vocab)), strict=True))
                )
            logged |= self._from_cell(model, batch, states[batch.first], *asked, len(hidden))
        terms = ((value, self.from_cell if name.endswith("_cell") else 1.0) for name, value in logged.items())
        total = torch.stack([weight * value for value, weight in terms]).sum()
        # moments of what was hidden: the error is only meaningful as a share of its variance
        logged |= {"target": target.sum(), "target_squared": (target**2).sum()}
        return Loss(total, torch.tensor(len(hidden), device=target.device), logged)

    def _from_cell(
        self, model: CellModel, batch: Batch, cell: Tensor, genes: Tensor, cell_of: Tensor, target: Tensor, n: int
    ) -> dict[str, Tensor]:
        """Errors of the values predicted from the cell embedding, at the scale of ``n`` hidden positions."""
        predicted = model.decode_cell(cell, genes, cell_of, batch)
        scale = n / max(1, len(target))
        found = {}
        if "cell_value" in predicted:
            found["mse_cell"] = scale * losses.squared_error(predicted["cell_value"], target)
        if "cell_zero" in predicted:
            found["zero_cell"] = scale * losses.zero_likelihood(predicted["cell_zero"], target)
        return found

    def _left_out(self, batch: Batch, out: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Genes, cells and values of what was left out, and of as many measured genes drawn at random."""
        assert batch.values is not None
        assert batch.measured is not None
        cell = batch.cell[out]
        number = torch.arange(len(out), device=out.device) - torch.searchsorted(cell, cell)
        draws = uniform(batch.keys[cell], number, _ABSENT)
        genes = batch.measured[(draws * len(batch.measured)).long()]
        # a gene drawn is zero unless the cell expresses it: looked up among the (cell, gene) pairs of the batch
        pairs, order = (batch.cell * n_tokens + batch.genes).sort()
        wanted = cell * n_tokens + genes
        place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
        values = torch.where(pairs[place] == wanted, batch.values[order[place]], 0)
        both = (batch.genes[out], genes), (cell, cell), (batch.values[out], values)
        return tuple(map(torch.cat, both))  # type: ignore[return-value]

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Errors by head, and moments of the hidden values."""
        return (*model.value_losses(self.from_cell > 0), "target", "target_squared")

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Errors, the share of the hidden values' variance that is left, and the mask ratio."""
        mean, squared = means.pop("target"), means.pop("target_squared")
        variance = squared - mean**2
        share = {"mse_share": means["mse"] / variance} if variance > 0 else {}
        return {**means, **share, "mask_ratio": self.ratio(step)}


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
        known = ("ce", "bce", "dice", "focal")
        if not self.loss or set(self.loss) - set(known):
            raise ValueError(f"loss is {dict(self.loss)}, names of {known} with weights expected. Use loss='ce'.")

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Summed over labelled cells and heads."""
        outputs = model.head_outputs(model.embed(batch, pooling=model.pooling))
        total = torch.zeros((), device=batch.genes.device)
        count = torch.zeros((), dtype=torch.long, device=batch.genes.device)
        logged: dict[str, Tensor] = {}
        for spec in model.head_specs:
            target, predicted = batch.obs[f"label:{spec.key}"], outputs[spec.key]
            there = target >= 0 if spec.classes is not None else target.isfinite()
            target, predicted = target[there], predicted[there]
            name = "" if len(model.head_specs) == 1 else f"_{spec.key}"
            if spec.classes is None:
                error = losses.squared_error(predicted.squeeze(1), (target - spec.mean) / spec.std)
                total = total + error
                logged[f"mse{name}"] = error
            elif len(target):
                total = total + self._labels(predicted, target, spec.key)
                logged[f"accuracy{name}"] = (predicted.argmax(1) == target).sum()
            count = count + len(target)
        return Loss(total, count, logged)

    def _labels(self, logits: Tensor, label: Tensor, key: str) -> Tensor:
        weight = torch.tensor(self.class_weight[key], device=logits.device) if key in self.class_weight else None
        total = torch.zeros((), device=logits.device)
        for name, factor in self.loss.items():
            match name:
                case "ce":
                    smoothing = self.label_smoothing
                    each = F.cross_entropy(
                        logits.float(), label, weight=weight, reduction="sum", label_smoothing=smoothing
                    )
                case "bce":
                    each = losses.binary_cross_entropy(logits, label, weight).sum()
                case "focal":
                    each = losses.focal(logits, label, weight).sum()
                case "dice":
                    # does not add up over micro-batches: reported as its value times the cells
                    each = losses.dice(logits, label) * len(label)
            total = total + factor * each
        return total

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Accuracy of labels, squared error of values."""
        several = len(model.head_specs) > 1
        return tuple(
            ("mse" if spec.classes is None else "accuracy") + (f"_{spec.key}" if several else "")
            for spec in model.head_specs
        )

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """As logged."""
        return means


def objective_to_dict(objective: Objective) -> dict[str, Any]:
    """Plain settings of an objective."""
    return {"kind": type(objective).__name__, **asdict(objective)}  # type: ignore[call-overload]


def objective_from_dict(saved: Mapping[str, Any]) -> Objective:
    """The objective that :func:`objective_to_dict` described."""
    settings = dict(saved)
    kinds: dict[str, type] = {"MaskedValue": MaskedValue, "Label": Label}
    kind = kinds[settings.pop("kind")]
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = tuple(value)
    return kind(**settings)


def uniform(keys: Tensor, entries: Tensor, salt: int = 0) -> Tensor:
    """One number in [0, 1) for each entry, a function of (key, salt, entry): what ``kernels.draws`` draws, in torch."""
    return (_combine(_combine(keys, torch.full_like(keys, salt)), entries) >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _combine(state: Tensor, part: Tensor) -> Tensor:
    return _scramble(state ^ _scramble(part))


def _scramble(z: Tensor) -> Tensor:
    # splitmix64 on int64: products wrap as they do unsigned, shifts need the sign bits cleared
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
