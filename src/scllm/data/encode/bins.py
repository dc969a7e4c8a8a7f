"""Bins of each cell's expressed genes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from scllm._typing import IntArray
from scllm.data.encode.base import TIES, check_max_len, token_sequence
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.kernels.binning import bin_rows
from scllm.kernels.draws import row_keys, uniform_entries

__all__ = ["BinEncoder", "Ties", "check_n_bins", "check_ties", "tie_draws"]

Ties = Literal["middle", "left", "right", "random"]


@dataclass(frozen=True)
class BinEncoder:
    """Bins of each cell's expressed genes, as scGPT reads them (Cui et al., Nat. Methods 2024).

    Parameters
    ----------
    n_bins
        Number of bins, the zero bin included.
    max_len
        Longest token sequence, ``<cls>`` included. Longer cells are truncated to their highest values, or to a random
        subset of genes in training.
    ties
        Which of several possible bins a value gets, see :func:`scllm.pp.bin_expression`.
    cls_value
        Value of the token ``<cls>``.
    include_zeros
        Whether measured genes without a count are part of the token sequence (bin 0).
    """

    n_bins: int = 51
    max_len: int = 1201
    ties: Ties = "middle"
    cls_value: float = 0
    include_zeros: bool = False

    def __post_init__(self) -> None:
        check_n_bins(self.n_bins)
        check_ties(self.ties)
        check_max_len(self.max_len)

    @property
    def n_specials(self) -> int:
        """``<cls>``."""
        return 1

    @property
    def needs_counts(self) -> bool:
        """Counts, normalised and log-transformed values give the same bins."""
        return False

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """None: all settings are plain numbers."""
        return {}

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Bin over all genes of the vocabulary, truncate, and put ``<cls>`` first."""
        draws = tie_draws(counts, keys, random_state) if self.ties == "random" else None
        dtype = np.uint8 if self.n_bins <= 256 else np.uint16
        bins = bin_rows(
            counts.indptr, np.asarray(counts.values), n_bins=self.n_bins, ties=self.ties, draws=draws, dtype=dtype
        ).astype(np.float32)
        zeros_of = measured if self.include_zeros else None
        return token_sequence(counts, bins, vocab, keys, self.max_len, self.cls_value, zeros_of)


def check_n_bins(n_bins: int) -> None:
    """Raise unless ``n_bins`` is an integer that allows the zero bin and at least one more."""
    if not isinstance(n_bins, (int, np.integer)):
        raise TypeError(f"Expected n_bins to be an integer, got {n_bins!r}. scGPT uses n_bins=51.")
    if not 2 <= n_bins <= 65_536:
        raise ValueError(
            f"Expected n_bins of at least 2 (the zero bin and one more) and at most 65,536, got {n_bins}. scGPT uses "
            "n_bins=51."
        )


def check_ties(ties: str) -> None:
    """Raise unless ``ties`` is one of the four rules."""
    if ties not in get_args(Ties):
        raise ValueError(f"Expected ties to be one of {get_args(Ties)}, got {ties!r}. 'middle' adds the least noise.")


def tie_draws(counts: Tokens, keys: IntArray | None, random_state: int) -> NDArray[np.float64]:
    """Draw a uniform number per token; at inference it depends on the seed and on which genes the cell expresses."""
    if keys is None:
        keys = row_keys(counts.indptr, counts.genes, random_state)
    return uniform_entries(counts.indptr, counts.genes, keys, TIES)
