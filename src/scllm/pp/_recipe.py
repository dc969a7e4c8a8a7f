"""The preprocessing of scGPT's pretraining in one call."""

from __future__ import annotations

from typing import Literal

import numpy as np
from anndata import AnnData

from scllm import _keys
from scllm._checks import obs_column
from scllm._log import log
from scllm._results import record
from scllm.data.checks import check_source
from scllm.data.encode import check_n_bins
from scllm.data.source import open_source
from scllm.pp._bin import bin_expression

__all__ = ["recipe_scgpt"]


def recipe_scgpt(
    adata: AnnData,
    *,
    n_top_genes: int = 1200,
    batch_key: str | None = None,
    flavor: Literal["seurat_v3", "seurat_v3_paper", "seurat", "cell_ranger"] = "seurat_v3",
    min_gene_counts: int = 3,
    min_genes: int | None = None,
    target_sum: float = 1e4,
    n_bins: int = 51,
    copy: bool = False,
) -> AnnData | None:
    """Filter, choose highly variable genes per sample, normalise, take logarithms and bin.

    scanpy does every step that scanpy has. Models read counts and encode by themselves; this recipe chooses the genes
    they see and leaves layers to look at.

    Parameters
    ----------
    adata
        Cells by genes with raw counts in ``X``.
    n_top_genes
        Highly variable genes to keep; all that are left after filtering where there are fewer.
    batch_key
        Column of samples: genes are ranked in each and the ranks combined.
    flavor
        How genes are ranked, see :func:`scanpy.pp.highly_variable_genes`.
    min_gene_counts
        Genes with fewer counts over all cells are dropped.
    min_genes
        Cells with fewer expressed genes are dropped; ``None`` keeps all.
    target_sum
        Counts that each cell is normalised to, over the genes kept.
    n_bins
        Bins of :func:`bin_expression`.
    copy
        Return a changed copy in place of changing ``adata``.

    Writes
    ------
    ``adata``
        Subset to the cells and genes kept; ``X`` normalised and logged.
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
    import scanpy as sc

    check_n_bins(n_bins)
    if adata.isbacked:
        raise ValueError(
            "adata is backed by a file, data in memory expected: the recipe changes X. Call adata.to_memory() first."
        )
    if batch_key is not None:
        obs_column(adata.obs, batch_key)
    check_source(open_source(adata), needs_counts=True, layer=None, hint=_hint(adata))
    adata = adata.copy() if copy else adata
    if min_genes is not None:
        sc.pp.filter_cells(adata, min_genes=min_genes)
    sc.pp.filter_genes(adata, min_counts=min_gene_counts)
    adata.layers[_keys.COUNTS] = adata.X.copy()
    if n_top_genes < adata.n_vars:
        if flavor in ("seurat", "cell_ranger"):  # these rank logged values
            logged = AnnData(
                sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=target_sum, inplace=False)["X"]), adata.obs
            )
            genes = sc.pp.highly_variable_genes(
                logged, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key, inplace=False
            )
            chosen = genes["highly_variable"].to_numpy()
        else:
            sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key)
            chosen = adata.var["highly_variable"].to_numpy()
        adata._inplace_subset_var(np.flatnonzero(chosen))
    else:
        log.info(
            "%d genes are left after filtering, no more than n_top_genes=%d: all are kept", adata.n_vars, n_top_genes
        )
    sc.pp.normalize_total(adata, target_sum=target_sum)
    sc.pp.log1p(adata)
    bin_expression(adata, n_bins=n_bins, layer=_keys.COUNTS)
    params = {
        "n_top_genes": n_top_genes, "batch_key": batch_key, "flavor": flavor, "min_gene_counts": min_gene_counts,
        "min_genes": min_genes, "target_sum": target_sum, "n_bins": n_bins,
    }  # fmt: skip
    record(adata, "recipe_scgpt", params)
    return adata if copy else None


def _hint(adata: AnnData) -> str:
    if _keys.COUNTS in adata.layers:
        return "layers['counts'] may hold them: adata.X = adata.layers['counts'].copy()."
    return "Start from the raw counts, or undo the normalisation."
