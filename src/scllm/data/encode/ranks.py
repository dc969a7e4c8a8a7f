"""Genes of a cell in descending order of expression, relative to each gene's median."""

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
from scllm.kernels.ragged import crop_random
from scllm.kernels.ranking import scaled, top_rows

__all__ = ["RankEncoder"]


@dataclass(frozen=True)
class RankEncoder:
    """Expressed genes in descending order of ``count / median``, as Geneformer reads them (Theodoris et al. 2023).

    The depth of a cell does not change the order, so counts are not normalised. Ties are ordered by token id. The
    original has no rule for ties: it sorts the columns of the file with numpy's unstable sort, whose order within a tie
    depends on the columns and on the processor.

    Parameters
    ----------
    max_len
        Longest token sequence, special tokens included. Longer cells are truncated to their first genes, or to a random
        subset of genes in training.
    cls, eos
        Whether token sequences begin with ``<cls>`` and end with ``<eos>`` (Geneformer V2; V1 has neither).
    medians
        Non-zero median of each token's normalised counts, ``(n_tokens,)``; ``None`` ranks by the counts themselves.
        Genes without a median (NaN) are dropped.
    """

    max_len: int = 2048
    cls: bool = False
    eos: bool = False
    medians: FloatArray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_max_len(self.max_len)
        if self.medians is None:
            return
        known = self.medians[np.isfinite(self.medians)]
        if not (known > 0).all():
            raise ValueError(
                f"Expected gene medians above zero (they are medians of non-zero counts), got {known.min():g}. Use "
                "NaN for a gene without a median."
            )

    @property
    def n_specials(self) -> int:
        """``<cls>`` and ``<eos>``, if they are used."""
        return int(self.cls) + int(self.eos)

    @property
    def needs_counts(self) -> bool:
        """The medians are medians of counts."""
        return True

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The medians, if there are any."""
        return {} if self.medians is None else {"medians": self.medians}

    def __call__(
        self, counts: Tokens, vocab: Vocab, keys: IntArray | None = None, *, measured: IntArray, random_state: int = 0
    ) -> Tokens:
        """Order, truncate, and add the special tokens."""
        del measured, random_state  # a gene that is not expressed has no rank, and nothing is drawn at inference
        indptr, genes, strength = counts.indptr, counts.genes, np.asarray(counts.values)
        if self.medians is not None:
            if len(self.medians) != len(vocab):
                raise ValueError(
                    f"Expected one gene median per token, got {len(self.medians)} gene medians for {len(vocab)} "
                    "tokens. Use a vocabulary and medians that belong together."
                )
            strength = scaled(strength, genes, self.medians)
            if np.isnan(strength.min(initial=0)):
                known = ~np.isnan(strength)
                indptr = np.concatenate([[0], np.cumsum(known)])[indptr]
                strength, genes = strength[known], genes[known]
        room = self.max_len - self.n_specials
        # token ids are ascending within a cell and the sort is stable, so ties are ordered by token id
        if keys is not None:
            # the random subset can be drawn before sorting, because a subset is sorted in the same order
            indptr, kept = crop_random(indptr, room, uniform_entries(indptr, genes, keys, CROP))
            strength, genes = strength[kept], genes[kept]
        indptr, genes = top_rows(indptr, strength, genes, room)
        return _with_specials(indptr, genes, vocab, cls=self.cls, eos=self.eos)


def _with_specials(indptr: IntArray, genes: IntArray, vocab: Vocab, *, cls: bool, eos: bool) -> Tokens:
    """Put ``<cls>`` before and ``<eos>`` after each token sequence, if wanted."""
    if not cls and not eos:
        return Tokens(indptr, genes, None)
    n_cells = len(indptr) - 1
    full = np.empty(len(genes) + n_cells * (cls + eos), np.int32)
    ends = indptr + np.arange(n_cells + 1) * (cls + eos)
    is_gene = np.ones(len(full), bool)
    if cls:
        is_gene[ends[:-1]] = False
        full[ends[:-1]] = vocab.cls_id
    if eos:
        is_gene[ends[1:] - 1] = False
        full[ends[1:] - 1] = vocab.eos_id
    full[is_gene] = genes
    return Tokens(ends, full, None)
