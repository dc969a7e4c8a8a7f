"""Genes of a cell by falling expression, relative to each gene's median."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm._typing import FloatArray, IntArray
from scllm.data.encode.base import CROP, check_max_len
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.kernels.draws import uniform_entries
from scllm.kernels.ragged import crop_random, crop_top
from scllm.kernels.ranking import order_rows

__all__ = ["RankEncoder"]


@dataclass(frozen=True)
class RankEncoder:
    """A cell's expressed genes by falling ``count / median``, as Geneformer reads them (Theodoris et al. 2023).

    The depth of a cell does not change its order, so counts are not normalised. Equal values stand in gene order.

    Parameters
    ----------
    max_len
        Longest sentence, specials included. Longer cells keep their first genes, in training a random subset.
    cls, eos
        Whether ``<cls>`` stands first and ``<eos>`` last (Geneformer V2; V1 has neither).
    medians
        Non-zero median of each token's normalised counts, ``(n_tokens,)``; ``None`` ranks by counts alone. Genes
        without a median (NaN) are left out.
    """

    max_len: int = 2048
    cls: bool = False
    eos: bool = False
    medians: FloatArray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_max_len(self.max_len)

    @property
    def n_specials(self) -> int:
        """``<cls>`` and ``<eos>``, where they are."""
        return int(self.cls) + int(self.eos)

    @property
    def needs_counts(self) -> bool:
        """Medians are those of counts."""
        return True

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The medians, if there are any."""
        return {} if self.medians is None else {"medians": self.medians}

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Order, crop, and put specials around."""
        del measured, random_state  # a gene that is not expressed has no rank, and nothing is drawn at inference
        strength: NDArray[np.floating[Any]] = np.asarray(counts.values, np.float32)
        indptr, genes = counts.indptr, counts.genes
        if self.medians is not None:
            strength = strength / self.medians[genes]
            known = np.isfinite(strength)
            indptr = np.concatenate([[0], np.cumsum(known)])[indptr]
            strength, genes = strength[known], genes[known]
        genes = genes[order_rows(indptr, strength)]
        room = self.max_len - self.n_specials
        if keys is None:
            indptr, kept = crop_top(indptr, np.zeros(len(genes), np.float32), room)  # all alike: the first stay
        else:
            indptr, kept = crop_random(indptr, room, uniform_entries(indptr, genes, keys, CROP))
        return _with_specials(indptr, genes[kept], vocab, cls=self.cls, eos=self.eos)


def _with_specials(indptr: IntArray, genes: IntArray, vocab: Vocab, *, cls: bool, eos: bool) -> Tokens:
    """``<cls>`` before and ``<eos>`` after each sentence, where wanted."""
    n_cells = len(indptr) - 1
    full = np.empty(len(genes) + n_cells * (cls + eos), np.int32)
    ends = indptr + np.arange(n_cells + 1) * (cls + eos)
    cell = np.repeat(np.arange(n_cells), np.diff(indptr))
    full[np.arange(len(genes)) + cell * (cls + eos) + cls] = genes
    if cls:
        full[ends[:-1]] = vocab.cls_id
    if eos:
        full[ends[1:] - 1] = vocab.eos_id
    return Tokens(ends, full, None)
