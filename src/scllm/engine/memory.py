"""Micro-batches that fit into memory: their limit, and what to do when memory runs out all the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch

from scllm.models.base import Batch

__all__ = ["TokenLimit", "is_out_of_memory", "longest", "micro_batches"]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device, or the machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


class TokenLimit:
    """Largest number of tokens in a micro-batch, which a run notes in its directory when memory runs out.

    Parameters
    ----------
    file
        Where the limit is noted.
    given
        Limit that the user has set; ``None`` for none.
    """

    def __init__(self, file: Path, given: int | None) -> None:
        self._file = file
        self.n_tokens = min(given or math.inf, float(file.read_text()) if file.is_file() else math.inf)

    def halve(self, n_tokens: int) -> None:
        """Set the limit to half of what has just been too much."""
        self.n_tokens = n_tokens // 2

    def note(self) -> None:
        """Note the limit for the processes that resume the run."""
        self._file.write_text(str(int(self.n_tokens)))


def micro_batches(batch: Batch, n_tokens: float) -> Iterator[Batch]:
    """Cut a batch into parts of consecutive cells with at most ``n_tokens`` tokens, or one cell."""
    cuts, size = [0], 0
    for cell, length in enumerate(batch.lengths):
        if size and size + length > n_tokens:
            cuts.append(cell)
            size = 0
        size += length
    cuts.append(batch.n_cells)
    if len(cuts) == 2:
        yield batch
        return
    for first, last in pairwise(cuts):
        yield batch.cells(first, last)


def longest(batch: Batch, n_cells: int, length: int) -> Batch:
    """Make a batch of cells that are as long as possible from the tokens of another one, to try out the memory."""
    tokens = torch.arange(n_cells * length) % max(1, len(batch.genes))
    cells = torch.arange(n_cells) % max(1, batch.n_cells)
    whole = None if batch.whole is None else longest(batch.whole, n_cells, max(batch.whole.lengths))
    view = None if batch.view is None else longest(batch.view, n_cells, length)
    measured = batch.measured
    return replace(
        batch,
        genes=batch.genes[tokens],
        values=None if batch.values is None else batch.values[tokens],
        cu_seqlens=torch.arange(0, n_cells * length + 1, length, dtype=torch.int32),
        lengths=(length,) * n_cells,
        keys=batch.keys[cells],
        obs={name: column[cells] for name, column in batch.obs.items()},
        measured=None if measured is None else replace(measured, first=measured.first[cells], n=measured.n[cells]),
        whole=whole,
        view=view,
        spacing=None if batch.spacing is None else batch.spacing[cells],
    )
