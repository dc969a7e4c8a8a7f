"""Expression of every gene of the vocabulary in integer log2 levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm._typing import IntArray
from scllm.data.encode.base import check_max_len, token_sequence
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

__all__ = ["LevelEncoder"]

_TARGET_SUM = np.float32(1e4)


@dataclass(frozen=True)
class LevelEncoder:
    """Levels ``floor(log2(1 + count / total * 1e4))``, as scBERT reads them (Yang et al. 2022).

    Every token sequence holds every gene of the vocabulary, in the order of the vocabulary. A gene that is not
    expressed or not measured has level 0. ``<eos>`` with level 0 comes last.

    Parameters
    ----------
    n_levels
        Number of levels, zero included; higher values get the highest level.
    max_len
        Longest token sequence, ``<eos>`` included. With a larger vocabulary, cells are truncated to their highest
        values, or to a random subset of genes in training.
    """

    n_levels: int = 6
    max_len: int = 16_907

    def __post_init__(self) -> None:
        check_max_len(self.max_len)
        if not 2 <= self.n_levels <= 256:
            raise ValueError(f"Expected n_levels from 2 to 256, got {self.n_levels}. scBERT uses n_levels=6.")

    @property
    def n_specials(self) -> int:
        """``<eos>``."""
        return 1

    @property
    def needs_counts(self) -> bool:
        """Normalisation starts from raw counts."""
        return True

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """None: all settings are plain numbers."""
        return {}

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Normalise, compute levels, add the genes without a count, and put ``<eos>`` last."""
        del measured, random_state  # all genes of the vocabulary are read, and nothing is drawn at inference
        levels = np.floor(self.log2(counts)).clip(max=self.n_levels - 1)
        full = token_sequence(counts, levels, vocab, keys, self.max_len - 1, None, vocab.gene_ids)
        ends = full.indptr[1:]
        return Tokens(
            full.indptr + np.arange(len(full.indptr)),
            np.insert(full.genes, ends, vocab.eos_id),
            np.insert(np.asarray(full.values), ends, 0),
        )

    def log2(self, counts: Tokens) -> NDArray[np.float32]:
        """Compute ``log2(1 + count / total * 1e4)`` of each count, with the same rounding steps as scanpy."""
        values = np.asarray(counts.values, np.float32)
        cell = np.repeat(np.arange(len(counts)), counts.lengths)
        totals = np.bincount(cell, weights=values, minlength=len(counts)).astype(np.float32)
        # in float64, because NumPy's float32 logarithm differs in its last bit between processors, as would levels
        logged = np.log1p(values / (totals / _TARGET_SUM)[cell], dtype=np.float64).astype(np.float32)
        return (logged / np.log(np.float64(2))).astype(np.float32)
