"""Compute hidden states and simple statistics of genes over the cells that express them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.decomposition import PCA
from torch import Tensor

from scllm import _keys
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.checks import read_checked
from scllm.data.genes import GeneMatch
from scllm.data.source import open_source
from scllm.data.value_kind import is_log_like
from scllm.engine.config import Precision
from scllm.engine.loader import Loader
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel

__all__ = ["GeneCells", "choose_cells", "gene_statistics", "pooled"]

_CELLS_READ = 512
_N_COMPONENTS = 10
_TARGET_SUM = 1e4


@dataclass(frozen=True)
class GeneCells:
    """Genes and the cells over which their hidden states are averaged.

    Parameters
    ----------
    adata
        Counts, ``var`` and gene matching of these cells, which are in the order of the draw.
    match
        The token of each gene in ``adata``.
    tokens
        Tokens of the genes to average, ``(g,)``.
    used
        Whether the hidden state of a gene in a cell is used, ``(n_cells, g)``: up to ``max_cells`` cells per gene.
    n_read
        Number of these cells in which the model reads the gene, ``(g,)``.
    """

    adata: AnnData
    match: GeneMatch
    tokens: IntArray
    used: CSR
    n_read: IntArray

    @property
    def source(self) -> CellSource:
        """Counts of the cells."""
        return open_source(self.adata)

    @property
    def n_cells(self) -> IntArray:
        """Number of cells used for each gene, ``(g,)``."""
        return np.bincount(self.used.indices, minlength=len(self.tokens))

    def take(self, chosen: np.ndarray) -> GeneCells:
        """Select some of the genes, in the same cells."""
        used = sparse.csr_matrix(self.used[:, chosen])
        return GeneCells(self.adata, self.match, self.tokens[chosen], used, self.n_read[chosen])


def choose_cells(
    adata: AnnData,
    source: CellSource,
    match: GeneMatch,
    model: CellModel,
    tokens: IntArray,
    *,
    max_cells: int,
    random_state: int,
) -> GeneCells:
    """Draw up to ``max_cells`` cells for each gene; the draw depends on cell names, not on the order of cells.

    A cell counts for a gene if the model reads the gene there: the gene is expressed and not lost by truncation.
    """
    is_read = _sequences_with(source, match, model, tokens)
    names = adata.obs_names.to_numpy().astype(str).astype(object)
    drawn = pd.util.hash_array(names, hash_key=f"{random_state % 10**16:016d}")
    order = np.argsort(drawn, kind="stable")
    by_gene = sparse.csc_matrix(is_read[order])
    place = np.arange(len(by_gene.indices)) - np.repeat(by_gene.indptr[:-1], np.diff(by_gene.indptr))
    kept = sparse.coo_array(by_gene)
    used = sparse.csr_matrix(
        (np.ones((place < max_cells).sum(), bool), np.array(kept.coords)[:, place < max_cells]), shape=by_gene.shape
    )
    in_use = np.flatnonzero(np.diff(used.indptr))
    rows = order[in_use]
    ascending = np.sort(rows)
    counts = read_checked(source, ascending)[np.searchsorted(ascending, rows)]
    uns = {name: value for name, value in adata.uns.get(_keys.UNS, {}).items() if name == "match_genes"}
    cells = AnnData(counts, pd.DataFrame(index=adata.obs_names[rows]), source.var, uns={_keys.UNS: uns})
    n_read = np.bincount(is_read[rows].indices, minlength=len(tokens))
    return GeneCells(cells, match, tokens, used[in_use], n_read)


def _sequences_with(source: CellSource, match: GeneMatch, model: CellModel, tokens: IntArray) -> CSR:
    """Return which token sequences contain each gene, ``(n_cells, g)``."""
    gene_of = _gene_of(model, tokens)
    cells = Loader(source, np.arange(source.n_obs), match, model.encoder, model.vocab, _CELLS_READ, training=False)
    parts = []
    for (batch,) in cells.epoch(0):
        at = model.is_expressed(batch) & (gene_of[batch.genes] >= 0)
        where = batch.cell[at].numpy(), gene_of[batch.genes[at]].numpy()
        parts.append(sparse.csr_matrix((np.ones(len(where[0]), bool), where), shape=(batch.n_cells, len(tokens))))
    return sparse.vstack(parts, format="csr")


def _gene_of(model: CellModel, tokens: IntArray) -> Tensor:
    """Return the index of the gene for each token of the vocabulary, -1 for none."""
    table = torch.full((len(model.vocab),), -1)
    table[torch.from_numpy(tokens).long()] = torch.arange(len(tokens))
    return table


def pooled(
    cells: GeneCells,
    model: CellModel,
    state: Callable[[CellModel, Batch], Tensor],
    *,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> FloatArray:
    """Average ``state``, ``(t, d)`` for the tokens of a batch, over the cells of each gene: ``(g, d)`` float64."""
    gene_of, n_genes = _gene_of(model, cells.tokens), len(cells.tokens)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        # gene and cell are columns beside the state, because forward returns one array
        gene = gene_of.to(batch.genes.device)[batch.genes]
        at = replica.is_expressed(batch) & (gene >= 0)
        return torch.cat([torch.stack([gene, batch.cell], 1)[at].float(), state(replica, batch)[at].float()], dim=1)

    total: Tensor | None = None
    for rows, found in predict(
        model,
        cells.source,
        cells.match,
        forward,
        batch_size=batch_size,
        device=device,
        precision=precision,
        desc="computing hidden states of genes in",
    ):
        gene, cell = found[:, 0].long(), found[:, 1].long() + rows.start
        kept = torch.from_numpy(_is_in(cells.used, rows, cell.numpy(), gene.numpy()))
        total = torch.zeros(n_genes, found.shape[1] - 2, dtype=torch.float64) if total is None else total
        total.index_add_(0, gene[kept], found[kept, 2:].double())
    assert total is not None
    return total.numpy() / cells.n_cells[:, None]


def _is_in(used: CSR, rows: slice, cell: IntArray, gene: IntArray) -> np.ndarray:
    """Return which pairs of cell and gene are used."""
    part = used[rows]
    n_genes = used.shape[1]
    known = (np.repeat(np.arange(rows.start, rows.stop), np.diff(part.indptr)) * n_genes) + part.indices
    return np.isin(cell * n_genes + gene, known)


def gene_statistics(cells: GeneCells, n_tokens: int, *, random_state: int = 0) -> FloatArray:
    """Compute simple statistics of each gene as features for the baseline, ``(g, 3 + n_components)``.

    They are computed from log-normalised counts of the same cells: mean, variance and fraction of expressing cells
    (each as a logarithm, because they span orders of magnitude), and the loadings of the gene on the leading principal
    components of the gene-gene correlation.
    """
    logged = _log_normalised(cells, n_tokens)
    n_cells = logged.shape[0]
    mean = np.asarray(logged.mean(0)).ravel()
    variance = np.maximum(np.asarray(logged.power(2).mean(0)).ravel() - mean**2, 0)
    share = np.bincount(logged.indices, minlength=n_tokens) / n_cells
    scale = np.divide(1, np.sqrt(variance), out=np.zeros(n_tokens), where=variance > 1e-12)
    scaled = sparse.csr_matrix(logged @ sparse.diags(scale))
    n_components = min(_N_COMPONENTS, min(scaled.shape) - 1)
    pca = PCA(n_components, svd_solver="arpack", random_state=random_state).fit(scaled)
    loadings = pca.components_.T * np.sqrt(pca.explained_variance_)
    floor = 1 / (_TARGET_SUM * n_cells)
    simple = np.log(np.column_stack([mean, variance, share]) + floor)
    return np.concatenate([simple, loadings], axis=1)[cells.tokens]


def _log_normalised(cells: GeneCells, n_tokens: int) -> CSR:
    """Return cells by tokens, log-normalised unless the data already are."""
    matrix = cells.source.read(slice(None))
    counts = cells.match.tokens(matrix)
    values = counts.values.astype(np.float64)
    if not is_log_like(matrix):
        total = np.asarray(matrix.sum(1), np.float64).ravel()
        values = np.log1p(values * np.repeat(_TARGET_SUM / np.maximum(total, 1e-12), counts.lengths))
    return sparse.csr_matrix((values, counts.genes, counts.indptr), shape=(len(counts), n_tokens))
