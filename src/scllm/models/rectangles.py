"""Packed cells as a few rectangles: groups of cells of similar length, padded to the longest of the group.

A GPU computes a rectangle in one launch, where a loop over cells would need one for each. Where the tokens go is worked
out once a batch and from its lengths alone, so that nothing waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scllm._typing import IntArray

__all__ = ["Rectangles", "groups", "rectangles"]

# padding is at most this part of a padded cell
_WASTE = 1 / 8


def groups(lengths: Sequence[int]) -> list[IntArray]:
    """Group cells of similar length, longest first; cells without tokens are in no group.

    At most an eighth of a padded cell is padding. The number of groups grows with the logarithm of the ratio of the
    longest to the shortest cell: 15 for lengths from 160 to 1,200.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    descending = sizes[order]
    found: list[IntArray] = []
    begin, end = 0, int((descending > 0).sum())
    while begin < end:
        # the first cell that is shorter than the longest of the group allows
        stop = int(np.searchsorted(-descending, -descending[begin] * (1 - _WASTE), side="right"))
        found.append(order[begin : min(stop, end)])
        begin = stop
    return found


@dataclass(frozen=True)
class Rectangles:
    """Places of the tokens of a packed batch in rectangles of cells by tokens.

    Parameters
    ----------
    cells
        Cells of each rectangle, ``(n,)``.
    tokens
        Token at each place of each rectangle, ``(n, l)``. Padding repeats the last token of its cell, so that it is
        finite and is not larger than the largest token of the cell.
    there
        Which places are no padding, ``(n, l)``; ``None`` if all are.
    places
        Place of each token of the batch in all rectangles one after the other, ``(t,)``.
    order
        Place of each cell among the cells of all rectangles one after the other, ``(b,)``; -1 for cells without tokens.
    """

    cells: tuple[Tensor, ...]
    tokens: tuple[Tensor, ...]
    there: tuple[Tensor | None, ...]
    places: Tensor
    order: Tensor

    def split(self, packed: Tensor) -> list[Tensor]:
        """Return the rectangles of a packed tensor, ``(t, ...)`` to ``(n, l, ...)`` each."""
        return [packed.index_select(0, at.flatten()).unflatten(0, at.shape) for at in self.tokens]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the packed tensor of rectangles, without padding."""
        return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, self.places)


# all layers ask for the same batch, one after the other
@lru_cache(maxsize=2)
@torch.inference_mode(False)  # tensors of inference mode could not be used in training afterwards
def rectangles(lengths: tuple[int, ...], device: torch.device) -> Rectangles:
    """Place the tokens of cells of these lengths."""
    ends = np.cumsum(lengths, dtype=np.int64)
    places = np.empty(int(ends[-1]) if len(ends) else 0, np.int64)
    order = np.full(len(lengths), -1, np.int64)
    cells, tokens, there, n_places, n_cells = [], [], [], 0, 0
    for group in groups(lengths):
        long = np.asarray(lengths)[group]
        at = np.arange(long[0])
        inside = at < long[:, None]
        of_token = (ends[group] - long)[:, None] + np.minimum(at, long[:, None] - 1)
        places[of_token[inside]] = n_places + inside.ravel().nonzero()[0]
        order[group] = n_cells + np.arange(len(group))
        n_places, n_cells = n_places + inside.size, n_cells + len(group)
        cells.append(_moved(group, device))
        tokens.append(_moved(of_token, device))
        there.append(None if inside.all() else _moved(inside, device))
    return Rectangles(tuple(cells), tuple(tokens), tuple(there), _moved(places, device), _moved(order, device))


def _moved(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
