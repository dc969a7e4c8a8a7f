"""Preprocessing as for the pretraining of scGPT."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from scllm import _keys
from scllm._checks import check_adata, groups, obs_column
from scllm._log import log
from scllm._results import record
from scllm.data.checks import check_source, layer_with_counts
from scllm.data.encode.bins import check_n_bins
from scllm.data.genes import check_unique
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.data.value_kind import is_near_integer
from scllm.pp._bin import bin_expression

__all__ = ["recipe_scgpt"]

Flavor = Literal["seurat_v3", "seurat_v3_paper", "seurat", "cell_ranger"]

_LEAST_VARYING = 4


@closes_files
def recipe_scgpt(
    adata: AnnData,
    *,
    n_top_genes: int = 1200,
    batch_key: str | None = None,
    flavor: Flavor = "seurat_v3",
    min_gene_counts: int = 3,
    min_genes: int | None = None,
    target_sum: float = 1e4,
    n_bins: int = 51,
    copy: bool = False,
) -> AnnData | None:
    """Filter cells and genes, select highly variable genes per sample, normalise, log-transform and bin.

    All steps that scanpy has are done by scanpy. Models read counts and encode them by themselves; this recipe selects
    the genes that they read, and writes layers for inspection.

    Parameters
    ----------
    adata
        Cells by genes with raw counts in ``X``.
    n_top_genes
        Number of highly variable genes to keep. If fewer genes are left after filtering, all of them are kept.
    batch_key
        Column of samples. Genes are ranked within each sample, and the ranks are combined.
    flavor
        How genes are ranked, see :func:`scanpy.pp.highly_variable_genes`.
    min_gene_counts
        Genes with fewer counts over all cells are dropped.
    min_genes
        Cells that express fewer of the remaining genes are dropped; ``None`` keeps all cells.
    target_sum
        Total count that each cell is normalised to, over the genes that are kept.
    n_bins
        Number of bins, see :func:`bin_expression`.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata``
        Subset to the cells and genes that are kept; ``X`` is normalised and log-transformed.
    ``adata.layers["counts"]``
        Raw counts.
    ``adata.layers["binned"]``
        Bins, see :func:`bin_expression`.

    Examples
    --------
    >>> adata = scllm.datasets.pbmc68k()
    >>> scllm.pp.recipe_scgpt(adata, n_top_genes=300)
    >>> adata.shape
    (700, 300)
    """
    check_adata(adata, copy)
    import scanpy as sc

    check_n_bins(n_bins)
    _check_settings(n_top_genes, flavor, target_sum)
    if adata.isbacked:
        raise ValueError(
            "Expected data in memory, since the recipe changes X, but adata is backed by a file. Call "
            "adata.to_memory() first."
        )
    if batch_key is not None:
        obs_column(adata.obs, batch_key)
    check_unique(adata.var_names)
    check_source(open_source(adata), needs_counts=True, layer=None, hint=lambda: layer_with_counts(adata, into_x=True))
    cells, genes = _kept(adata, n_top_genes, batch_key, flavor, min_gene_counts, min_genes, target_sum)
    adata = adata.copy() if copy else adata
    adata._inplace_subset_obs(cells)
    adata._inplace_subset_var(genes)
    adata.X = _matrix(adata.X)
    adata.layers[_keys.COUNTS] = adata.X.copy()
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata)
    bin_expression(adata, n_bins=n_bins, layer=_keys.COUNTS)
    params = {
        "n_top_genes": n_top_genes,
        "batch_key": batch_key,
        "flavor": flavor,
        "min_gene_counts": min_gene_counts,
        "min_genes": min_genes,
        "target_sum": target_sum,
        "n_bins": n_bins,
    }
    record(adata, "recipe_scgpt", params)
    return adata if copy else None


def _check_settings(n_top_genes: int, flavor: str, target_sum: float) -> None:
    if n_top_genes < 1 or not 0 < target_sum < np.inf:
        raise ValueError(
            f"Expected positive numbers, got n_top_genes={n_top_genes} and target_sum={target_sum}. "
            "scGPT uses 1200 and 1e4."
        )
    if flavor not in get_args(Flavor):
        raise ValueError(f"Expected flavor to be one of {get_args(Flavor)}, got {flavor!r}. scGPT uses 'seurat_v3'.")


def _kept(
    adata: AnnData,
    n_top_genes: int,
    batch_key: str | None,
    flavor: Flavor,
    min_gene_counts: int,
    min_genes: int | None,
    target_sum: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return masks of the cells and genes to keep, found on a copy so that an error leaves the data unchanged."""
    import scanpy as sc

    part = AnnData(_matrix(adata.X), adata.obs[[] if batch_key is None else [batch_key]])
    if batch_key is not None:
        part.obs[batch_key] = groups(part.obs, batch_key)
    genes, _ = sc.pp.filter_genes(part, min_counts=min_gene_counts, inplace=False)
    cells = np.ones(adata.n_obs, bool)
    if min_genes is not None:
        cells, _ = sc.pp.filter_cells(part[:, genes], min_genes=min_genes, inplace=False)
    if not cells.any() or not genes.any():
        raise ValueError(
            f"Expected at least one gene and one cell to pass min_gene_counts={min_gene_counts} and "
            f"min_genes={min_genes}, got {genes.sum()} genes and {cells.sum()} cells. Lower these thresholds."
        )
    if n_top_genes >= genes.sum():
        log.info(
            "keeping all %d genes left after filtering, since n_top_genes=%d is no fewer", genes.sum(), n_top_genes
        )
        return cells, genes
    part = part[cells][:, genes].copy()
    if flavor in ("seurat", "cell_ranger"):  # these rank log-transformed values
        sc.pp.normalize_total(part, target_sum=target_sum)
        sc.pp.log1p(part)
    smallest = _check_samples(part, batch_key, flavor)
    try:
        ranked = sc.pp.highly_variable_genes(
            part, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key, inplace=False
        )
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"Expected enough cells to rank genes with flavor={flavor!r}, got {smallest} ({error}). "
            "Merge or drop small samples, or use flavor='seurat'."
        ) from error
    genes[genes] = ranked["highly_variable"].to_numpy()
    return cells, genes


def _check_samples(part: AnnData, batch_key: str | None, flavor: Flavor) -> str:
    """Describe the smallest sample; raise ``ValueError`` if too few genes vary in a sample."""
    if batch_key is None:
        _check_varying(part.X, flavor, "the data")
        return f"{part.n_obs} cells"
    samples = part.obs[batch_key]
    sizes = samples.value_counts()
    if samples.isna().any() or sizes.min() < 2:
        raise ValueError(
            f"Expected a sample of at least 2 cells for every cell, but obs[{batch_key!r}] is missing in "
            f"{samples.isna().sum()} cells, and its smallest sample {sizes.idxmin()!r} has {sizes.min()}. Merge or "
            "drop small samples, and drop cells without one."
        )
    for sample in sizes.index:
        _check_varying(part.X[(samples == sample).to_numpy()], flavor, f"sample {sample!r}")
    return f"{sizes.min()} cells in {sizes.idxmin()!r}"


def _check_varying(matrix: Any, flavor: Flavor, name: str) -> None:
    """Raise ``ValueError`` if too few genes vary for scanpy's fit of variances, which would end the process."""
    if not flavor.startswith("seurat_v3"):
        return
    spread = matrix.max(axis=0) - matrix.min(axis=0)
    n_varying = spread.count_nonzero() if sparse.issparse(spread) else np.count_nonzero(spread)
    if n_varying < _LEAST_VARYING:
        raise ValueError(
            f"Expected at least {_LEAST_VARYING} genes that vary between the {matrix.shape[0]} cells of {name} with "
            f"flavor={flavor!r}, got {n_varying}. Merge or drop small samples, or use flavor='seurat'."
        )


def _matrix(matrix: Any) -> Any:
    """Prepare a matrix for scanpy: no sparse array, no duplicate entries, and no floating-point noise in counts."""
    if sparse.issparse(matrix) and not isinstance(matrix, sparse.spmatrix):
        matrix = sparse.csr_matrix(matrix)
    if sparse.issparse(matrix) and matrix.format in ("csr", "csc") and not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    values = matrix.data if sparse.issparse(matrix) else matrix
    noisy = is_near_integer(values) & (values != np.rint(values))
    if noisy.any():
        matrix = matrix.copy()
        values = matrix.data if sparse.issparse(matrix) else matrix
        values[noisy] = np.rint(values[noisy])
    return matrix
