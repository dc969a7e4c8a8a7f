"""Normalised values of expressed genes, followed by the depth to predict at and the sequenced depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm._typing import FloatArray, IntArray
from scllm.data.encode.base import token_sequence
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

__all__ = ["SOURCE", "TARGET", "DepthEncoder"]

TARGET, SOURCE = "<T>", "<S>"
_TARGET_SUM = 1e4


@dataclass(frozen=True)
class DepthEncoder:
    """``log1p(count / total * 1e4)`` of each expressed gene, then ``<T>`` and ``<S>`` (scFoundation, Hao et al. 2024).

    ``<S>`` is the logarithm (base 10) of the cell's total count, ``<T>`` that of the depth at which expression is to
    be predicted. Every token sequence has both tokens.

    Parameters
    ----------
    target
        Value of ``<T>``: ``"t4"`` is 4 for every cell (10,000 counts), ``"f2"`` means twice the cell's own total, and
        ``"a1"`` is one more than ``<S>`` (ten times the total).
    max_len
        Longest token sequence, both depths included. Longer cells are truncated to their highest values, or to a random
        subset of genes in training; totals are those of the whole cell.
    normalised
        Whether the data already hold ``log1p`` of normalised values, as bulk profiles often do. Values are then read
        unchanged, and the total is their sum.
    """

    target: str = "t4"
    max_len: int = 19_266
    normalised: bool = False

    def __post_init__(self) -> None:
        if self.max_len < 3:
            raise ValueError(
                f"Expected max_len of at least 3 (<T>, <S> and one gene), got {self.max_len}. Pass a larger max_len."
            )
        if self.target[:1] not in ("t", "f", "a") or not _is_number(self.target[1:]):
            raise ValueError(
                f"Expected target to be 't', 'f' or 'a' followed by a number, got {self.target!r}. 't4' asks for "
                "10,000 counts, 'f2' for twice the cell's own depth, 'a1' for ten times it."
            )
        if self.target[0] == "f" and float(self.target[1:]) <= 0:
            raise ValueError(
                f"Expected a positive factor in target, got {self.target!r}. 'f1' is the cell's own depth."
            )

    @property
    def n_specials(self) -> int:
        """``<T>`` and ``<S>``."""
        return 2

    @property
    def needs_counts(self) -> bool:
        """Normalisation starts from raw counts, unless it has been done."""
        return not self.normalised

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """None: all settings are plain."""
        return {}

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Normalise, truncate, and put both depths at the end."""
        depth_ids = vocab.ids([TARGET, SOURCE])
        if (depth_ids < 0).any():
            raise ValueError(
                f"Expected the special tokens {TARGET} and {SOURCE} in the vocabulary, got {vocab.specials}. Build "
                "the model from gene names: scfoundation makes its own vocabulary from them."
            )
        del measured, random_state  # genes without a count have no token, and nothing is drawn at inference
        values = np.asarray(counts.values, np.float64)
        cell = np.repeat(np.arange(len(counts)), counts.lengths)
        totals = np.bincount(cell, weights=values, minlength=len(counts))
        if not self.normalised:
            values = np.log1p(values / totals[cell] * _TARGET_SUM)
        read = token_sequence(counts, values.astype(np.float32), vocab, keys, self.max_len - 2, None, None)
        ends = np.repeat(read.indptr[1:], 2)
        depths = np.stack(self._depths(totals), axis=1).ravel()
        return Tokens(
            read.indptr + 2 * np.arange(len(read.indptr)),
            np.insert(read.genes, ends, np.tile(depth_ids, len(counts))),
            np.insert(np.asarray(read.values), ends, depths.astype(np.float32)),
        )

    def _depths(self, totals: NDArray[Any]) -> tuple[FloatArray, FloatArray]:
        """Compute ``<T>`` and ``<S>`` of each cell; an empty cell is treated like a cell with one count."""
        source, number = np.log10(np.where(totals > 0, totals, 1)), float(self.target[1:])
        match self.target[0]:
            case "t":
                return np.full(len(source), number), source
            case "f":
                return source + np.log10(number), source
        return source + number, source


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
