"""Which tokens of a cell are hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from scllm.engine.objectives.base import uniform
from scllm.models.base import Batch

__all__ = ["drawn_share"]


def drawn_share(batch: Batch, among: Tensor, share: float, salt: int = 0) -> Tensor:
    """Positions of a share of each cell's tokens ``among`` ``(t,)``, rounded up, drawn by the cells' keys."""
    positions = among.nonzero().squeeze(1)
    cell = batch.cell[positions]
    draws = uniform(batch.keys[cell], batch.genes[positions], salt)
    # cells one after the other, the smallest draws of each first
    order = torch.argsort(cell + draws * (1 - 2**-30))
    n_among = torch.bincount(cell, minlength=batch.n_cells)
    place = torch.arange(len(cell), device=cell.device) - (n_among.cumsum(0) - n_among)[cell]
    # ceil(share * n) in exact halves, not above it by rounding: 0.15 * 20 is 3
    n_drawn = (n_among.double() * share - 1e-9).ceil().long()
    return positions[order[place < n_drawn[cell]]].sort().values
