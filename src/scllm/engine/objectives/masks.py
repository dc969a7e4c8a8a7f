"""Which tokens of a cell are hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from scllm.engine.objectives.base import uniform
from scllm.models.base import Batch

__all__ = ["drawn_share"]


def drawn_share(batch: Batch, among: Tensor, share: float, salt: int = 0, *, up: bool = False) -> Tensor:
    """Positions of a share of each cell's tokens ``among`` ``(t,)``: those with the smallest draws.

    How many is rounded down, or ``up``; draws are a function of the cells' keys and ``salt``.
    """
    positions = among.nonzero().squeeze(1)
    cell = batch.cell[positions]
    draws = uniform(batch.keys[cell], batch.genes[positions], salt)
    order = torch.argsort(cell + draws * (1 - 2**-30))
    n_among = torch.bincount(cell, minlength=batch.n_cells)
    place = torch.arange(len(cell), device=cell.device) - (n_among.cumsum(0) - n_among)[cell]
    exact = n_among.double() * share
    # a share such as 0.15 of 20 is 3, and not above it by rounding
    n_drawn = (exact - 1e-9).ceil().long() if up else exact.floor().long()
    return positions[order[place < n_drawn[cell]]].sort().values
