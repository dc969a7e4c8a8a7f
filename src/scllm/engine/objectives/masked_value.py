"""Masked value prediction (scGPT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scllm.engine import losses
from scllm.engine.objectives.base import Loss, uniform
from scllm.engine.objectives.masks import drawn_share
from scllm.kernels.draws import mix
from scllm.models.base import Batch, CellModel

__all__ = ["MaskedValue"]

# independent random numbers for each purpose
OUT, ABSENT = 5, 6


@dataclass(frozen=True)
class MaskedValue:
    """Mask values and predict them from hidden states of genes and from the cell embedding (scGPT).

    Parameters
    ----------
    mask_ratio
        Shares of a cell's genes to mask; one of them is drawn for each step. ``<cls>`` is never masked.
    from_cell
        Weight of the loss of values predicted from the cell embedding.
    left_out
        Share of each cell's genes that are held out of the input. Their values, and those of as many random genes (most
        of them zero), are predicted from the cell embedding too. The embedding thus has to contain which genes a cell
        expresses, not only how much. With 0, training is as in scGPT.
    seed
        Seed for drawing the mask ratio of each step.
    """

    mask_ratio: tuple[float, ...] = (0.25, 0.5, 0.75)
    from_cell: float = 1.0
    left_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.mask_ratio or not all(0 < ratio < 1 for ratio in self.mask_ratio):
            raise ValueError(
                f"Expected mask_ratio to be numbers between 0 and 1, got {self.mask_ratio}. scGPT uses "
                "(0.25, 0.5, 0.75)."
            )
        if not 0 <= self.left_out < 1:
            raise ValueError(
                f"Expected left_out of at least 0 and below 1, got {self.left_out}. Pass 0 to hold no genes out."
            )

    @property
    def share_read(self) -> float:
        """Share of a cell's genes that the model reads in training."""
        return 1 - self.left_out

    def ratio(self, step: int) -> float:
        """Return the share that is masked in a step."""
        return self.mask_ratio[int(mix(self.seed, step) % len(self.mask_ratio))]

    def hide(self, batch: Batch, is_special: Tensor, ratio: float, salt: int = 0) -> Tensor:
        """Return positions of masked tokens: in each cell, the ``floor(ratio * genes)`` with the smallest draws."""
        return drawn_share(batch, ~is_special[batch.genes], ratio, salt)

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum squared errors over masked positions; from the cell embedding, also over held-out genes."""
        assert batch.values is not None
        everything, out = batch, None
        if self.left_out:
            out = self.hide(batch, model.is_special, self.left_out, OUT)
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
            asked, weight = (batch.genes[hidden], cell_of, target), None
            if out is not None:
                others = self._left_out(everything, out, len(model.vocab))
                asked = tuple(map(torch.cat, zip(asked, others, strict=True)))
                weight = _weight(cell_of, asked[1], batch.n_cells)
            logged |= self._from_cell(model, batch, states[batch.first], *asked, weight)
        terms = ((value, self.from_cell if name.endswith("_cell") else 1.0) for name, value in logged.items())
        total = torch.stack([weight * value for value, weight in terms]).sum()
        # moments of the masked values: the error only means something relative to their variance
        logged |= {"target": target.sum(), "target_squared": (target**2).sum()}
        return Loss(total, torch.tensor(len(hidden), device=target.device), logged)

    def _from_cell(
        self,
        model: CellModel,
        batch: Batch,
        cell: Tensor,
        genes: Tensor,
        cell_of: Tensor,
        target: Tensor,
        weight: Tensor | None,
    ) -> dict[str, Tensor]:
        """Compute errors of values predicted from the cell embedding."""
        predicted = model.decode_cell(cell, genes, cell_of, batch)
        found = {}
        if "cell_value" in predicted:
            found["mse_cell"] = losses.squared_error(predicted["cell_value"], target, weight)
        if "cell_zero" in predicted:
            found["zero_cell"] = losses.zero_likelihood(predicted["cell_zero"], target, weight)
        return found

    def _left_out(self, batch: Batch, out: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return genes, cells and values of the held-out genes, and of as many random measured genes."""
        assert batch.values is not None
        assert batch.measured is not None
        cell = batch.cell[out]
        number = torch.arange(len(out), device=out.device) - torch.searchsorted(cell, cell)
        draws = uniform(batch.keys[cell], number, ABSENT)
        genes = batch.measured.drawn(cell, draws)
        # a random gene is zero unless its (cell, gene) pair is in the batch
        pairs, order = (batch.cell * n_tokens + batch.genes).sort()
        wanted = cell * n_tokens + genes
        place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
        values = torch.where(pairs[place] == wanted, batch.values[order[place]], 0)
        both = (batch.genes[out], genes), (cell, cell), (batch.values[out], values)
        return tuple(map(torch.cat, both))  # type: ignore[return-value]

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log errors by head and moments of the masked values."""
        return (*model.value_losses(self.from_cell > 0), "target", "target_squared")

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report errors, the unexplained share of the masked values' variance, and the mask ratio."""
        mean, squared = means.pop("target"), means.pop("target_squared")
        variance = squared - mean**2
        share = {"mse_share": means["mse"] / variance} if variance > 0 else {}
        return {**means, **share, "mask_ratio": self.ratio(step)}


def _weight(masked: Tensor, asked: Tensor, n_cells: int) -> Tensor:
    """Weight the genes asked of each cell's embedding so that they count as much as its masked genes.

    The weight depends only on the cell, so losses of micro-batches add up to that of the batch.
    """
    weight = torch.bincount(masked, minlength=n_cells) / torch.bincount(asked, minlength=n_cells).clamp(min=1)
    return weight[asked]
