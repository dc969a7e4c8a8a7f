"""Non-zero median of each gene's normalised counts, relative to which genes are ranked (Theodoris et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from scllm._log import progress
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.checks import read_checked
from scllm.data.genes import GeneMatch
from scllm.kernels.tally import BIN_CENTRES, add_to_tally

__all__ = ["MedianSketch", "exact_medians", "streamed_medians", "token_medians"]

_ROWS = 4096


class MedianSketch:
    """Compute medians of many genes in one pass, to within 1/128 of their value.

    Values are counted in bins whose width is a fixed fraction of the value (as in DDSketch, Masson et al. 2019).
    Sketches of parts of the data can therefore be added up. A sketch takes 7 kB per gene for any number of cells.
    """

    def __init__(self, n_genes: int) -> None:
        self.tally = np.zeros((n_genes, len(BIN_CENTRES)), np.uint32)

    def add(self, genes: IntArray, values: FloatArray) -> None:
        """Count positive values of genes; values normalised to 10,000 counts are within the range of the bins."""
        add_to_tally(genes, values, self.tally)

    def merge(self, other: MedianSketch) -> None:
        """Add the counts of another sketch of the same genes."""
        self.tally += other.tally

    def medians(self) -> FloatArray:
        """Return the median of each gene (the mean of two middle values), NaN if nothing was counted."""
        cumulative = np.cumsum(self.tally, axis=1, dtype=np.int64)
        n = cumulative[:, -1]
        lower, upper = ((cumulative <= middle[:, None]).sum(1) for middle in ((n - 1) // 2, n // 2))
        last = len(BIN_CENTRES) - 1
        middle = (BIN_CENTRES[np.minimum(lower, last)] + BIN_CENTRES[np.minimum(upper, last)]) / 2
        return np.where(n > 0, middle, np.nan)


def exact_medians(
    counts: CSR, *, target_sum: float, match: GeneMatch | None = None, n_tokens: int | None = None
) -> FloatArray:
    """Compute the median of each column's non-zero values, each row scaled to ``target_sum``; NaN for empty columns.

    With ``match``, compute the median of each of ``n_tokens`` tokens; columns with the same token are summed.
    """
    normalised = sparse.csr_matrix((_normalised(counts, target_sum), counts.indices, counts.indptr), shape=counts.shape)
    if match is not None:
        tokens = match.tokens(normalised)
        shape = (counts.shape[0], n_tokens)
        normalised = sparse.csr_matrix((tokens.values, tokens.genes, tokens.indptr), shape=shape)
    columns = normalised.tocsc()
    columns.eliminate_zeros()
    medians = np.full(normalised.shape[1], np.nan)
    for gene in np.flatnonzero(np.diff(columns.indptr)):
        medians[gene] = np.median(columns.data[columns.indptr[gene] : columns.indptr[gene + 1]])
    return medians


def streamed_medians(source: CellSource, *, target_sum: float) -> FloatArray:
    """Compute the median of each gene of a source in one pass over its cells, to within 1/128."""
    sketch = MedianSketch(len(source.genes))
    for counts in _blocks(source, np.arange(source.n_obs)):
        values = _normalised(counts, 1e4)
        there = values > 0
        sketch.add(counts.indices[there], values[there])
    return sketch.medians() * (target_sum / 1e4)


def token_medians(source: CellSource, match: GeneMatch, rows: IntArray, n_tokens: int) -> FloatArray:
    """Compute the median of each token over some cells of a source, NaN for tokens that no cell has.

    Cells are scaled to 10,000 counts over all genes.
    """
    sketch = MedianSketch(n_tokens)
    rows = np.sort(rows)
    for start, counts in zip(range(0, len(rows), _ROWS), _blocks(source, rows), strict=True):
        tokens = match.tokens(counts, rows[start : start + _ROWS])
        scale = 1e4 / np.maximum(_totals(counts), 1)
        sketch.add(tokens.genes, np.asarray(tokens.values, np.float64) * np.repeat(scale, tokens.lengths))
    return sketch.medians()


def _normalised(counts: CSR, target_sum: float) -> FloatArray:
    """Scale every row to the same sum, and return the values."""
    totals = _totals(counts)
    return counts.data / np.repeat(np.where(totals > 0, totals, 1), np.diff(counts.indptr)) * target_sum


def _totals(counts: CSR) -> FloatArray:
    """Sum each row in float64, because sums of float32 counts would depend on the order of the columns."""
    return np.asarray(counts.astype(np.float64).sum(1)).ravel()


def _blocks(source: CellSource, rows: IntArray) -> Iterator[CSR]:
    starts = range(0, len(rows), _ROWS)
    for start in progress(starts, desc="medians", total=len(starts), unit="block"):
        yield read_checked(source, rows[start : start + _ROWS])
