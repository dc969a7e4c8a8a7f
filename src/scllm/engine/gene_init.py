"""Initial gene embeddings and principal components from the data, by a singular value decomposition.

Gene embeddings are right singular vectors of the log-normalised matrix. As with the gene2vec embeddings of scBERT (Yang
et al. 2022), co-expressed genes start with similar embeddings. The principal components for relational pretraining
(engine/relational.py) come from the same passes over the cells.

This takes seconds and streams over the cells, so that no matrix of cells by genes is held in memory. Cells on disk are
read once: the passes after the first one read a temporary copy.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from scllm._log import log, progress
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.checks import read_checked
from scllm.data.genes import GeneMatch
from scllm.data.mapped import MappedRows, write_rows
from scllm.data.reference import Reference, log_normalised
from scllm.data.value_kind import is_log_like, value_kind
from scllm.models.base import CellModel

__all__ = [
    "N_COMPONENTS",
    "decompose",
    "gene_vectors",
    "reference",
    "set_gene_vectors",
    "start_from_data",
    "vectors_of",
]

_ROWS = 8_192
_MAX_CELLS = 200_000  # more cells do not change the singular vectors noticeably
# singular values below this multiple of the median are taken for noise
_STANDS_OUT = 1.05
# a value of the temporary copy: float64, and the int32 of its gene
_BYTES = 12

# principal components with which the relational term compares embeddings
N_COMPONENTS = 50
_N_DEPTHS = 1_001

# reads all cells in blocks of log-normalised values, with their rows; the argument describes what for
Pass = Callable[[str], Iterator[tuple[CSR, IntArray]]]


@dataclass(frozen=True)
class Decomposition:
    """The strongest singular vectors of log-normalised cells, as a subspace.

    Parameters
    ----------
    measured
        Tokens of the genes that a file measured, ``(g,)``.
    basis
        Orthonormal basis of the subspace, ``(g, k)``.
    small
        Matrix of the cells A within it, ``basis.T @ A.T @ A @ basis``.
    mean
        Mean of each gene over the cells, ``(g,)``.
    totals
        Total count of each cell.
    is_logged
        Whether the values are on a logarithmic scale by themselves.
    holds_counts
        Whether the values are counts, so that ``totals`` are sequencing depths.
    """

    measured: IntArray
    basis: FloatArray
    small: FloatArray
    mean: FloatArray
    totals: FloatArray
    is_logged: bool
    holds_counts: bool


def start_from_data(
    model: CellModel, source: CellSource, match: GeneMatch, rows: IntArray, *, random_state: int = 0
) -> None:
    """Initialise the model's gene embeddings from the data, in place; genes that are in no file keep theirs."""
    n_vectors, n_tokens = model.gene_table().shape[1], len(model.vocab)
    set_gene_vectors(model, gene_vectors(source, match, rows, n_vectors, n_tokens, random_state=random_state))


def set_gene_vectors(model: CellModel, vectors: FloatArray) -> None:
    """Replace the gene embeddings of a model, in place; those of genes without a vector stay."""
    table = model.gene_table()
    with torch.no_grad():
        spread = table.std()
        found = torch.from_numpy(np.flatnonzero(np.abs(vectors).sum(1) > 0))
        # scaled to the standard deviation with which the family initialises its table
        table[found] = torch.from_numpy(vectors)[found].to(table) * spread


def gene_vectors(
    source: CellSource, match: GeneMatch, rows: IntArray, n_vectors: int, n_tokens: int, *, random_state: int = 0
) -> FloatArray:
    """Compute right singular vectors of the log-normalised cells, scaled by singular values, ``(n_tokens, n_vectors)``.

    They are centred and have unit variance over all entries. The first one has the same weight as the second. Vectors
    with a singular value near the median are set to zero, and so are genes that are not measured. A gene that is not
    measured in a cell's file, but in others, has its mean there.
    """
    found = decompose(source, match, rows, n_vectors, n_tokens, random_state=random_state)
    return vectors_of(found, n_vectors, n_tokens)


def decompose(
    source: CellSource, match: GeneMatch, rows: IntArray, n_vectors: int, n_tokens: int, *, random_state: int = 0
) -> Decomposition:
    """Find the subspace of the ``n_vectors`` strongest singular vectors of the log-normalised cells.

    The method is randomised subspace iteration (Halko, Martinsson & Tropp 2011), with a few passes over the cells in
    row chunks.
    """
    rng = np.random.default_rng(random_state)
    if len(rows) > _MAX_CELLS:
        rows = np.sort(rng.choice(rows, _MAX_CELLS, replace=False))
    reading = _Reading(source, match, rows, n_tokens)
    with _passes(reading) as one_pass:
        basis, small, total = _subspace(one_pass, match, min(n_vectors, len(match.measured), len(rows)), rng)
    kind = reading.is_logged, reading.holds_counts
    return Decomposition(match.measured, basis, small, total / len(rows), reading.totals, *map(bool, kind))


def reference(found: Decomposition, n_tokens: int, *, thinned: bool) -> Reference:
    """Return the first 50 principal components, and the depths of cells if views are to be downsampled to them."""
    n_cells, mean = len(found.totals), found.basis.T @ found.mean
    axes = _strongest(found.basis, found.small - n_cells * np.outer(mean, mean), N_COMPONENTS)[0]
    full, means = np.zeros((n_tokens, axes.shape[1]), np.float32), np.zeros(n_tokens, np.float32)
    full[found.measured], means[found.measured] = axes, found.mean
    if thinned and not found.holds_counts:
        log.info("embedding views at their full depth, because the matrix holds no counts that can be downsampled")
    are_drawn = thinned and found.holds_counts
    depths = np.quantile(found.totals, np.linspace(0, 1, _N_DEPTHS)) if are_drawn else np.empty(0)
    return Reference(full, means, found.is_logged, depths)


def _strongest(basis: FloatArray, small: FloatArray, k: int) -> tuple[FloatArray, FloatArray]:
    """Return the strongest singular vectors in a subspace, at most ``k``, and their singular values."""
    # the eigenvalues of the small matrix are the squared singular values in the subspace
    squared, order = np.linalg.eigh(small)
    vectors = (basis @ order)[:, ::-1][:, :k]
    # the sign of a singular vector is arbitrary: the largest entry is made positive
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    return vectors, np.sqrt(np.maximum(squared[::-1][:k], 0))


def vectors_of(found: Decomposition, n_vectors: int, n_tokens: int) -> FloatArray:
    """Return the gene embeddings of a decomposition, as :func:`gene_vectors` describes them."""
    k = min(n_vectors, len(found.measured), len(found.totals))
    vectors, strength = _strongest(found.basis, found.small, k)
    vectors = (vectors - vectors.mean(0)) / np.maximum(vectors.std(0), 1e-12)
    # Vectors are weighted by their singular value, as in PCA, except for the first: it describes how highly each gene
    # is expressed in all cells and would dominate the others. Most vectors are noise with nearly equal singular values.
    weight = np.where(strength < _STANDS_OUT * np.median(strength), 0, strength)
    weight[0] = weight[1:2].sum()
    vectors *= weight
    vectors /= max(vectors.std(), 1e-12)
    full = np.zeros((n_tokens, n_vectors), np.float32)
    full[found.measured, :k] = vectors
    return full


def _subspace(
    one_pass: Pass, match: GeneMatch, k: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Find a basis B of the strongest singular vectors of the cells A, B^T A^T A B, and the sum of the cells."""
    means = _means(one_pass, match) if match.files else None
    n_genes = len(match.measured)
    basis = rng.standard_normal((n_genes, min(k + 10, n_genes)))
    for step in range(4):
        gathered = np.zeros_like(basis)
        for block in _filled(one_pass, match, means, f"gene vectors, pass {step + 1} of 4"):
            gathered += block.T @ (block @ basis)
        basis, _ = np.linalg.qr(gathered)
    small, total = np.zeros((basis.shape[1],) * 2), np.zeros(n_genes)
    for block in _filled(one_pass, match, means, "gene vectors"):
        projected = block @ basis
        small += projected.T @ projected
        total += block.T @ np.ones(block.shape[0])
    return basis, small, total


def _filled(one_pass: Pass, match: GeneMatch, means: FloatArray | None, desc: str) -> Iterator[CSR | LinearOperator]:
    """Yield log-normalised blocks of cells, with the mean of a gene in cells whose file did not measure it."""
    for block, cells in one_pass(desc):
        if means is None:
            yield block
            continue
        lacking, of_cell = _lacking(match, cells)
        # a product of thin matrices instead of a dense block of cells by genes
        yield aslinearoperator(block) + aslinearoperator(of_cell) @ aslinearoperator(lacking * means)


def _means(one_pass: Pass, match: GeneMatch) -> FloatArray:
    """Compute the mean of each gene over the cells whose file measured it."""
    total, n_cells = np.zeros((2, len(match.measured)))
    for block, cells in one_pass("gene vectors, means"):
        lacking, of_cell = _lacking(match, cells)
        total += np.asarray(block.sum(0)).ravel()
        n_cells += of_cell.sum(0) @ ~lacking
    return total / np.maximum(n_cells, 1)


@contextmanager
def _passes(reading: _Reading) -> Iterator[Pass]:
    """Yield a function that reads all cells: from memory, or from a temporary copy of what is on disk.

    The copy holds the same numbers, so the result is the same to the bit. It takes 12 bytes per expressed gene of up to
    200,000 cells; if that is more than half of the free space, the data are read in each pass.
    """
    rows, match = reading.rows, reading.match
    if not reading.source.chunked:
        yield reading.blocks
        return
    with tempfile.TemporaryDirectory(prefix="scllm-genes-") as folder:
        blocks = (block for block, _ in reading.blocks("reading cells for gene vectors"))
        first = next(blocks)
        needed, free = _BYTES * first.nnz * len(rows) / first.shape[0], shutil.disk_usage(folder).free
        if needed > free / 2:
            log.info(
                "reading the cells in each pass for gene vectors, because a copy would take %.1f of the %.1f GB that "
                "are free in '%s'; set TMPDIR to a folder on a larger disk",
                needed / 1e9,
                free / 1e9,
                folder,
            )
            yield reading.blocks
            return
        write_rows(chain([first], blocks), Path(folder))
        copied = MappedRows(Path(folder), len(match.measured))

        def from_copy(desc: str) -> Iterator[tuple[CSR, IntArray]]:
            starts = range(0, len(rows), _ROWS)
            for start in progress(starts, desc=desc, total=len(starts), unit="block"):
                places = np.arange(start, min(start + _ROWS, len(rows)))
                yield copied.read(places), rows[places]

        yield from_copy


def _lacking(match: GeneMatch, cells: IntArray) -> tuple[NDArray[np.bool_], FloatArray]:
    """Return which measured genes each file lacks, ``(files, genes)``, and each cell's file, ``(b, files)``."""
    by_file = match.by_file(cells)
    lacking = np.array([~np.isin(match.measured, file.measured) for file, _ in by_file])
    of_cell = np.zeros((len(cells), len(by_file)))
    for number, (_, places) in enumerate(by_file):
        of_cell[places, number] = 1
    return lacking, of_cell


@dataclass
class _Reading:
    """Reads cells as log-normalised blocks, and notes their totals."""

    source: CellSource
    match: GeneMatch
    rows: IntArray
    n_tokens: int
    is_logged: bool | None = None
    holds_counts: bool | None = None
    totals: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.totals = np.zeros(len(self.rows))

    def blocks(self, desc: str) -> Iterator[tuple[CSR, IntArray]]:
        """Yield blocks of cells and their rows; columns are ``match.measured``; logged values stay as they are."""
        column = np.zeros(self.n_tokens, np.int64)
        column[self.match.measured] = np.arange(len(self.match.measured))
        starts = range(0, len(self.rows), _ROWS)
        for start in progress(starts, desc=desc, total=len(starts), unit="block"):
            block = self.rows[start : start + _ROWS]
            counts = read_checked(self.source, block)
            if self.is_logged is None:
                self.is_logged, self.holds_counts = is_log_like(counts), value_kind(counts) == "counts"
            tokens = self.match.tokens(counts, block)
            cell = np.repeat(np.arange(len(tokens)), tokens.lengths)
            totals = np.bincount(cell, weights=np.asarray(tokens.values, np.float64), minlength=len(tokens))
            self.totals[start : start + len(block)] = totals
            logged = log_normalised(tokens, is_logged=self.is_logged)
            shape = (len(tokens), len(self.match.measured))
            yield sparse.csr_matrix((logged, column[tokens.genes], tokens.indptr), shape=shape), block
