"""Hidden expression at the depth that was sequenced, predicted from a shallower cell (scFoundation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scllm.engine import losses
from scllm.engine.objectives.base import Loss, uniform
from scllm.models.base import Batch, CellModel

__all__ = ["MaskedExpression"]

# draws of one cell for different purposes are independent
ASKED, FATE, OTHER = 7, 8, 9


@dataclass(frozen=True)
class MaskedExpression:
    """Hide expression of genes, zeros among them, and predict it for the whole cell (scFoundation).

    The model reads the cell as the loader gives it, with counts taken away (``TrainConfig.downsample``), and is asked
    for the depth and the expression of the cell before that. What is hidden is not in the encoder's sentence: there a
    gene without a value would say that it is expressed. The decoder reads it in its place.

    Parameters
    ----------
    mask_ratio
        Share of each cell's expressed genes to predict (one number in a tuple).
    zeros
        Share of the genes that a cell does not express to predict.
    hidden
        Share of those that are hidden from the model.
    swapped
        Share of those that stand there with the value of another gene of the cell. The rest stay as they are.
    seed
        Part of the run's settings; draws are keyed by cell and epoch.
    """

    mask_ratio: tuple[float, ...] = (0.3,)
    zeros: float = 0.03
    hidden: float = 0.8
    swapped: float = 0.1
    seed: int = 0

    predicts_whole_cells: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(self.mask_ratio) != 1 or not 0 < self.mask_ratio[0] < 1:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}, one share between 0 and 1 expected. scFoundation uses 0.3."
            )
        if not (0 <= self.zeros < 1 and 0 <= self.hidden and 0 <= self.swapped and self.hidden + self.swapped <= 1):
            raise ValueError(
                f"zeros is {self.zeros}, hidden {self.hidden} and swapped {self.swapped}; shares from 0 to 1 expected, "
                "hidden and swapped at most 1 together. scFoundation uses 0.03, 0.8 and 0.1."
            )

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Squared error summed over the genes asked for."""
        whole = batch if batch.whole is None else batch.whole
        assert whole.values is not None
        expression = whole.values.new_zeros(batch.n_cells, model.n_positions)
        expression[whole.cell, whole.genes] = whole.values
        cell, gene = self.asked(model, batch, expression)
        fate = uniform(batch.keys[cell], gene, FATE)
        away = fate < self.hidden + self.swapped
        value = torch.where(fate < self.hidden, model.config.mask_value, self._others(whole, batch.keys, cell, gene))
        shown = (cell[away], gene[away], value[away])
        read = model.at_depth(_without(batch, *shown[:2], model.n_positions), _depth(whole))
        target = expression[cell, gene]
        predicted = model.expression(model.gene_states(model.hidden(read), read, shown)[cell, gene])
        error = losses.squared_error(predicted, target)
        # moments of what was hidden: the error is only meaningful as a share of its variance
        logged = {"mse": error, "target": target.sum(), "target_squared": (target**2).sum()}
        return Loss(error, torch.tensor(len(target), device=target.device), logged)

    def asked(self, model: CellModel, batch: Batch, expression: Tensor) -> tuple[Tensor, Tensor]:
        """Cells and genes ``(n,)`` to predict, drawn among the measured genes; ``expression`` is ``(b, p)``."""
        if batch.measured is None:
            cell, gene = (~model.is_special).expand(batch.n_cells, -1).nonzero().T
        else:
            cell, gene = batch.measured.pairs()
        draws = uniform(batch.keys[cell], gene, ASKED)
        asked = draws < torch.where(expression[cell, gene] > 0, self.mask_ratio[0], self.zeros)
        return cell[asked], gene[asked]

    def _others(self, whole: Batch, keys: Tensor, cell: Tensor, gene: Tensor) -> Tensor:
        """For each gene asked for the value of a gene of the same cell, drawn; the depths come last in a cell."""
        assert whole.values is not None
        n_genes = whole.cu_seqlens.diff().long()[cell] - 2
        drawn = (uniform(keys[cell], gene, OTHER) * n_genes).long()
        return torch.where(n_genes > 0, whole.values[whole.first[cell] + drawn], 0)

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Error and moments of the hidden values."""
        return ("mse", "target", "target_squared")

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """The error, the share of the hidden values' variance that is left, and the mask ratio."""
        mean, squared = means.pop("target"), means.pop("target_squared")
        variance = squared - mean**2
        share = {"mse_share": means["mse"] / variance} if variance > 0 else {}
        return {**means, **share, "mask_ratio": self.mask_ratio[0]}


def _without(batch: Batch, cell: Tensor, gene: Tensor, n_positions: int) -> Batch:
    """The sentences without some genes, which need not all be there."""
    gone = torch.zeros(batch.n_cells, n_positions, dtype=torch.bool, device=gene.device)
    gone[cell, gene] = True
    at = gone[batch.cell, batch.genes].nonzero().squeeze(1)
    return batch.without(at, torch.bincount(batch.cell[at], minlength=batch.n_cells).tolist())


def _depth(whole: Batch) -> Tensor:
    """Counts of each cell, which its last token tells, ``(b,)``."""
    assert whole.values is not None
    return 10 ** whole.values[whole.cu_seqlens[1:].long() - 1]
