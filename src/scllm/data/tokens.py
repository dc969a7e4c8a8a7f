"""Cells as sequences of gene tokens, stored as ragged rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from scllm._typing import IntArray, Rows
from scllm.kernels.ragged import crop_random, crop_top, pad_rows, take_rows

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """Cells as ragged rows: cell ``i`` owns ``genes[indptr[i]:indptr[i + 1]]``.

    Parameters
    ----------
    indptr
        Position of each cell's first token, ``(n_cells + 1,)`` int64.
    genes
        Token ids, ``(n_tokens,)`` int32.
    values
        Value of each token: a bin, a count or normalised expression; ``None`` for rank-ordered token sequences.
    """

    indptr: IntArray
    genes: IntArray
    values: NDArray[np.generic] | None

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> IntArray:
        """Number of tokens of each cell."""
        return np.diff(self.indptr)

    def take(self, cells: Rows) -> Tokens:
        """Take the token sequences of some cells, in the given order."""
        rows = np.arange(len(self))[cells]
        if self.values is None:
            indptr, genes = take_rows(self.indptr, rows, self.genes)
            return Tokens(indptr, genes, None)
        indptr, genes, values = take_rows(self.indptr, rows, self.genes, self.values)
        return Tokens(indptr, genes, values)

    @classmethod
    def stacked(cls, parts: Sequence[Tokens], places: Sequence[IntArray] | None = None) -> Tokens:
        """Join the cells of several parts, one part after the other.

        With ``places``, each cell goes to its place in the result; places are ascending within a part.
        """
        if len(parts) == 1:
            return parts[0]
        indptr = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))])
        values = [part.values for part in parts if part.values is not None]
        whole = cls(indptr, np.concatenate([part.genes for part in parts]), np.concatenate(values) if values else None)
        return whole if places is None else whole.take(np.argsort(np.concatenate(places)))

    def slice(self, start: int, stop: int) -> Tokens:
        """Take consecutive cells without copying their tokens."""
        first, last = self.indptr[start], self.indptr[stop]
        values = None if self.values is None else self.values[first:last]
        return Tokens(self.indptr[start : stop + 1] - first, self.genes[first:last], values)

    def crop(self, max_len: int, rng: Generator | None = None) -> Tokens:
        """Truncate each cell to ``max_len`` tokens: a random subset, or without ``rng`` those with the highest values.

        The order of tokens does not change. Rank-ordered sequences have no values; without ``rng`` they keep their
        first tokens.
        """
        if not len(self) or self.lengths.max() <= max_len:
            return self
        if rng is not None:
            indptr, kept = crop_random(self.indptr, max_len, rng.random(len(self.genes)))
        else:
            order = np.zeros(len(self.genes), np.float32) if self.values is None else self.values
            indptr, kept = crop_top(self.indptr, order, max_len)
        return Tokens(indptr, self.genes[kept], None if self.values is None else self.values[kept])

    def padded(
        self, *, pad_id: int, pad_value: float = -2, length: int | None = None
    ) -> tuple[IntArray, NDArray[np.generic] | None]:
        """Make rectangular arrays ``(n_cells, length)``, truncating or padding cells at the end."""
        width = int(length if length is not None else self.lengths.max(initial=0))
        indptr, kept = crop_top(self.indptr, np.zeros(len(self.genes), np.float32), width)  # keeps the first
        genes = pad_rows(indptr, self.genes[kept], width, pad_id)
        return genes, None if self.values is None else pad_rows(indptr, self.values[kept], width, pad_value)
