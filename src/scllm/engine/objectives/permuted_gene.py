"""Gene prediction in a random order (XLNet)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from scllm.engine.objectives.base import Loss, uniform
from scllm.models.base import Batch, CellModel

if TYPE_CHECKING:
    from scllm.models.xlnet import Model

__all__ = ["PermutedGene", "turns"]

ORDER = 10


@dataclass(frozen=True)
class PermutedGene:
    """Predict each gene from the genes before it in a random order (Yang et al. 2019).

    Genes keep their position in the token sequence; the order only decides which genes a gene is predicted from. It
    depends on the cell and the epoch. All genes see ``<cls>``.

    Parameters
    ----------
    share
        Share of each cell's genes to predict, from the end of the order. 1 trains what :func:`scllm.tl.perplexity`
        measures. The original uses 1/6, which is faster but trains only predictions from many genes.
    seed
        Additional random seed.
    """

    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"Expected share above 0 and at most 1, got {self.share}. Pass 1 to predict all genes.")

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum the cross-entropy in nats over the predicted genes."""
        if model.likelihood != "permutation":
            raise ValueError(
                f"Expected a model with likelihood 'permutation' for PermutedGene, got {model.likelihood!r} (family "
                f"{model.family!r}). Use the family's own objective."
            )
        cell, special = batch.cell, model.is_special[batch.genes]
        # keyed by position, not by gene: the order must not depend on the genes
        place = torch.arange(len(cell), device=cell.device) - batch.first[cell]
        order = turns(batch, special, uniform(batch.keys[cell], place, 64 * self.seed + ORDER))
        n_genes = torch.bincount(cell[~special], minlength=batch.n_cells)
        n_shown = n_genes - (n_genes.double() * self.share).ceil().long()
        at = (~special & (order > n_shown[cell])).nonzero().squeeze(1)
        logits = cast("Model", model).permuted_logits(batch, order, at)
        total = F.cross_entropy(logits.float(), batch.genes[at], reduction="sum")
        return Loss(total, torch.tensor(len(at), device=at.device))

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log only the loss."""
        return ()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the means as they are."""
        return means


def turns(batch: Batch, special: Tensor, draws: Tensor) -> Tensor:
    """Return the order of tokens, ``(t,)``: 0 for special tokens, then 1, 2, ... for a cell's genes by rising draws."""
    cell = batch.cell
    # special tokens come first in their cell
    by_draw = torch.argsort(cell + torch.where(special, 0, 2**-30 + draws * (1 - 2**-20)), stable=True)
    turn = torch.empty_like(by_draw)
    n_special = torch.bincount(cell[special], minlength=batch.n_cells)
    turn[by_draw] = torch.arange(len(cell), device=cell.device) - batch.first[cell] - n_special[cell] + 1
    return turn.masked_fill(special, 0)
