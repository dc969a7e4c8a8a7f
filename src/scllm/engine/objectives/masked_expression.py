"""Masked expression at the sequenced depth, predicted from a downsampled cell (scFoundation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scllm.data.encode.base import CROP
from scllm.engine import losses
from scllm.engine.objectives.base import Loss, uniform
from scllm.models.base import Batch, CellModel

__all__ = ["MaskedExpression"]

# independent random numbers for each purpose
ASKED, FATE, OTHER = 7, 8, 9


@dataclass(frozen=True)
class MaskedExpression:
    """Mask the expression of genes, zeros included, and predict it at full depth (scFoundation).

    The model reads the downsampled cell (``TrainConfig.downsample``) and predicts the expression at the depth before
    downsampling. Masked genes are not in the encoder's token sequence, where their presence would reveal that they are
    expressed. The decoder reads them instead.

    Parameters
    ----------
    mask_ratio
        Share of each cell's expressed genes to predict (one number in a tuple).
    zeros
        Share of each cell's genes without expression to predict.
    hidden
        Share of the genes to predict that are masked.
    swapped
        Share of the genes to predict that get the value of another gene of the cell. The others keep their value.
    seed
        Part of the run's settings; random numbers are keyed by cell and epoch.
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
                f"Expected mask_ratio to be one number between 0 and 1, got {self.mask_ratio}. scFoundation uses 0.3."
            )
        if not (0 <= self.zeros < 1 and 0 <= self.hidden and 0 <= self.swapped and self.hidden + self.swapped <= 1):
            raise ValueError(
                "Expected zeros from 0 to below 1, and hidden and swapped of at least 0 that add up to at most 1, got "
                f"zeros={self.zeros}, hidden={self.hidden}, swapped={self.swapped}. scFoundation uses 0.03, 0.8, 0.1."
            )

    @property
    def share_read(self) -> float:
        """Share of a cell's expressed genes that the encoder reads in training."""
        return 1 - self.mask_ratio[0] * (self.hidden + self.swapped)

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum the squared error over the genes to predict."""
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
        shown = _with_unread(batch, shown, model)
        target = expression[cell, gene]
        predicted = model.expression(model.gene_states(model.hidden(read), read, shown)[cell, gene])
        error = losses.squared_error(predicted, target)
        # moments of the targets: the error only means something relative to their variance
        logged = {"mse": error, "target": target.sum(), "target_squared": (target**2).sum()}
        return Loss(error, torch.tensor(len(target), device=target.device), logged)

    def asked(self, model: CellModel, batch: Batch, expression: Tensor) -> tuple[Tensor, Tensor]:
        """Draw cells and genes ``(n,)`` to predict from the measured genes; ``expression`` is ``(b, p)``."""
        if batch.measured is None:
            cell, gene = (~model.is_special).expand(batch.n_cells, -1).nonzero().T
        else:
            cell, gene = batch.measured.pairs()
        draws = uniform(batch.keys[cell], gene, ASKED)
        asked = draws < torch.where(expression[cell, gene] > 0, self.mask_ratio[0], self.zeros)
        return cell[asked], gene[asked]

    def _others(self, whole: Batch, keys: Tensor, cell: Tensor, gene: Tensor) -> Tensor:
        """Draw for each gene to predict the value of a random gene of the same cell."""
        assert whole.values is not None
        # the last two tokens of a cell are its depths
        n_genes = whole.cu_seqlens.diff().long()[cell] - 2
        drawn = (uniform(keys[cell], gene, OTHER) * n_genes).long()
        return torch.where(n_genes > 0, whole.values[whole.first[cell] + drawn], 0)

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log the error and the moments of the targets."""
        return ("mse", "target", "target_squared")

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the error, the unexplained share of the targets' variance, and the mask ratio."""
        mean, squared = means.pop("target"), means.pop("target_squared")
        variance = squared - mean**2
        share = {"mse_share": means["mse"] / variance} if variance > 0 else {}
        return {**means, **share, "mask_ratio": self.mask_ratio[0]}


def _with_unread(batch: Batch, shown: tuple[Tensor, Tensor, Tensor], model: CellModel) -> tuple[Tensor, Tensor, Tensor]:
    """Add the genes that a random subset left out to what the decoder is shown: as hidden, whether expressed or not.

    It would read them as zeros otherwise. Genes are left out by a draw of their own, so that which are hidden does not
    say which are expressed.
    """
    if batch.spacing is None or batch.measured is None or not (batch.spacing > 1).any():
        return shown
    # of a truncated cell, a gene would be read if its draw is not above those of all genes that were
    draws = uniform(batch.keys[batch.cell], batch.genes, CROP).masked_fill(model.is_special[batch.genes], 0)
    highest = draws.new_zeros(batch.n_cells).scatter_reduce(0, batch.cell, draws, "amax")
    highest = highest.masked_fill(batch.spacing <= 1, 1)
    cell, gene = batch.measured.pairs()
    unread = uniform(batch.keys[cell], gene, CROP) > highest[cell]
    asked = torch.zeros(batch.n_cells, model.n_positions, dtype=torch.bool, device=draws.device)
    asked[shown[0], shown[1]] = True
    unread &= ~asked[cell, gene]
    cell, gene = cell[unread], gene[unread]
    hidden = shown[2].new_full((len(cell),), model.config.mask_value)
    return torch.cat([shown[0], cell]), torch.cat([shown[1], gene]), torch.cat([shown[2], hidden])


def _without(batch: Batch, cell: Tensor, gene: Tensor, n_positions: int) -> Batch:
    """Remove genes from token sequences; genes that a sequence does not contain are ignored."""
    gone = torch.zeros(batch.n_cells, n_positions, dtype=torch.bool, device=gene.device)
    gone[cell, gene] = True
    at = gone[batch.cell, batch.genes].nonzero().squeeze(1)
    return batch.without(at, torch.bincount(batch.cell[at], minlength=batch.n_cells).tolist())


def _depth(whole: Batch) -> Tensor:
    """Return the total counts of each cell, ``(b,)``, which its last token contains."""
    assert whole.values is not None
    return 10 ** whole.values[whole.cu_seqlens[1:].long() - 1]
