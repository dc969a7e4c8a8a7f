"""Each gene from those before it in a drawn order (XLNet)."""

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
    """Predict the genes of a sentence one after the other in an order drawn for the cell (Yang et al. 2019).

    A gene keeps its place in the sentence: only what it is predicted from is drawn. The order is a function of the
    cell and the epoch; ``<cls>`` is seen by all.

    Parameters
    ----------
    share
        Share of each cell's genes that are predicted, the last of the order. 1 trains what
        :func:`scllm.tl.perplexity` measures; the original's 1/6 trains genes with much context only, and is faster.
    seed
        What the order is keyed by besides.
    """

    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, a share above 0 and up to 1 expected. 1 predicts all genes.")

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Nats summed over the predicted genes."""
        if model.likelihood != "permutation":
            raise ValueError(
                f"PermutedGene goes with XLNet, the likelihood of this {model.family} model is {model.likelihood!r}. "
                "Use the family's own objective."
            )
        cell, special = batch.cell, model.is_special[batch.genes]
        # by place, not by gene: the order must say nothing of which gene stands there
        place = torch.arange(len(cell), device=cell.device) - batch.first[cell]
        order = turns(batch, special, uniform(batch.keys[cell], place, 64 * self.seed + ORDER))
        n_genes = torch.bincount(cell[~special], minlength=batch.n_cells)
        n_shown = n_genes - (n_genes.double() * self.share).ceil().long()
        at = (~special & (order > n_shown[cell])).nonzero().squeeze(1)
        logits = cast("Model", model).permuted_logits(batch, order, at)
        total = F.cross_entropy(logits.float(), batch.genes[at], reduction="sum")
        return Loss(total, torch.tensor(len(at), device=at.device))

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Nothing but the loss."""
        return ()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """As logged."""
        return means


def turns(batch: Batch, special: Tensor, draws: Tensor) -> Tensor:
    """When each token's turn comes, ``(t,)``: specials at 0, then the cell's genes 1, 2, ... by rising draws."""
    cell = batch.cell
    # specials go first in their cell
    by_draw = torch.argsort(cell + torch.where(special, 0, 2**-30 + draws * (1 - 2**-20)), stable=True)
    turn = torch.empty_like(by_draw)
    n_special = torch.bincount(cell[special], minlength=batch.n_cells)
    turn[by_draw] = torch.arange(len(cell), device=cell.device) - batch.first[cell] - n_special[cell] + 1
    return turn.masked_fill(special, 0)
