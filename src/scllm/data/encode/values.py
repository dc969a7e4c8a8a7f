"""Normalised expression, without bins or ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm._typing import IntArray
from scllm.data.encode.base import check_max_len, token_sequence
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

__all__ = ["ValueEncoder"]


@dataclass(frozen=True)
class ValueEncoder:
    """Log-normalised expression: ``log1p(count / total * target_sum)``, total over the genes of the vocabulary.

    Parameters
    ----------
    max_len
        Longest token sequence, special tokens included. Longer cells are truncated to their highest values, or to a
        random subset of genes in training.
    target_sum
        Total count that each cell is scaled to; ``None`` keeps values unchanged, without logarithm.
    cls_value
        Value of the token ``<cls>``; ``None`` for token sequences without ``<cls>``.
    include_zeros
        Whether measured genes without a count are part of the token sequence.
    """

    max_len: int = 20_000
    target_sum: float | None = 1e4
    cls_value: float | None = 0
    include_zeros: bool = True

    def __post_init__(self) -> None:
        check_max_len(self.max_len)

    @property
    def n_specials(self) -> int:
        """``<cls>``, if there is one."""
        return int(self.cls_value is not None)

    @property
    def needs_counts(self) -> bool:
        """Normalisation starts from raw counts; without it, values are used as they are."""
        return self.target_sum is not None

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """None: all settings are plain numbers."""
        return {}

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Normalise, truncate, and put ``<cls>`` first."""
        del random_state  # nothing is drawn at inference
        values = np.asarray(counts.values, np.float32)
        if self.target_sum is not None:
            cell = np.repeat(np.arange(len(counts)), counts.lengths)
            totals = np.bincount(cell, weights=values, minlength=len(counts))
            values = np.log1p(values * (self.target_sum / totals[cell])).astype(np.float32)
        zeros_of = measured if self.include_zeros else None
        return token_sequence(counts, values, vocab, keys, self.max_len, self.cls_value, zeros_of)
