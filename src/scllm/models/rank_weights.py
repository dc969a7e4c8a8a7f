"""Weights by which a cell's highest genes count more, however many genes were seen in it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["rank_weights"]

RankWeights = Literal["ranked", "linear"]

# The sum of all "ranked" weights, of however many genes, stays below this many first ones. Accuracy of a linear probe
# on states of an untrained model, at 100 and with equal weights: one pancreas study read by a probe of the other 0.99
# and 0.76 (in one 570 genes are seen in a cell, in the other 952), sorted blood cells 0.917 and 0.899.
_SCALE = 100.0


def rank_weights(
    cell: Tensor,
    values: Tensor | None,
    n_cells: int,
    how: RankWeights,
    *,
    spacing: Tensor | None = None,
    longest: int | None = None,
) -> Tensor:
    """Weights that fall with the rank r of a gene among the n of its cell, and add up to 1 in each cell.

    The deeper a cell was sequenced, the more genes of low expression are seen in it, which would pull a plain mean
    away from that of the same cell seen less deeply.

    Parameters
    ----------
    cell
        Cell of each gene, ascending, ``(t,)``.
    values
        Expression of each gene, ``(t,)``; equal values share their weights, so the order of genes does not matter.
        ``None``: genes stand in falling order.
    n_cells
        Number of cells.
    how
        As 1 / (1 + r / 100)² (``"ranked"``), or as 1 - r / n (``"linear"``), which keeps more of the order.
    spacing
        Of how many genes of each cell one is here, ``(n_cells,)``: ranks are those among all. ``None``: all are here.
    longest
        Genes that are read of a cell at most where no random part is: ``"linear"`` weights end there. ``None``: all.

    Returns
    -------
    float32, ``(t,)``.
    """
    place = torch.arange(len(cell), device=cell.device)
    falling = place if values is None else torch.argsort(values, descending=True, stable=True)
    order = falling[torch.argsort(cell[falling], stable=True)]
    size = torch.bincount(cell, minlength=n_cells)
    rank = place - (size.cumsum(0) - size)[cell]  # of what stands at each place of the order
    is_new = torch.ones_like(cell, dtype=torch.bool)
    if values is not None:
        value = values[order]
        is_new[1:] = (value[1:] != value[:-1]) | (cell[1:] != cell[:-1])
    tie = is_new.cumsum(0) - 1
    low = rank[is_new][tie]
    high = low + torch.bincount(tie)[tie]
    n = size[cell]
    if spacing is not None:
        low, high, n = low * spacing[cell], high * spacing[cell], n * spacing[cell]
    # means over the ranks from low to high
    if how == "linear":
        n = n if longest is None else n.clamp(max=longest)
        bottom, top = low.clamp(max=n), high.clamp(max=n)
        each = (top - bottom) * (1 - (bottom + top) / (2 * n)) / (high - low)
    else:
        each = 1 / ((1 + low / _SCALE) * (1 + high / _SCALE))
    weight = torch.empty_like(each)
    weight[order] = each
    return weight / torch.zeros(n_cells, device=cell.device).index_add(0, cell, weight)[cell]
