"""Random choice of the tokens to mask."""

from __future__ import annotations

import torch
from torch import Tensor

from scllm.engine.objectives.base import uniform
from scllm.models.base import Batch

__all__ = ["drawn_share"]


def drawn_share(batch: Batch, among: Tensor, share: float, salt: int = 0, *, up: bool = False) -> Tensor:
    """Return positions of a random share of each cell's tokens ``among``, ``(t,)``: those with the smallest draws.

    Their number is rounded down, or up if ``up``. Draws depend only on the cells' keys and ``salt``.
    """
    positions = among.nonzero().squeeze(1)
    cell = batch.cell[positions]
    draws = uniform(batch.keys[cell], batch.genes[positions], salt)
    order = torch.argsort(cell + draws * (1 - 2**-30))
    n_among = torch.bincount(cell, minlength=batch.n_cells)
    place = torch.arange(len(cell), device=cell.device) - (n_among.cumsum(0) - n_among)[cell]
    exact = n_among.double() * share
    # 0.15 of 20 must be 3, although it is slightly above 3 in floating point
    n_drawn = (exact - 1e-9).ceil().long() if up else exact.floor().long()
    return positions[order[place < n_drawn[cell]]].sort().values
