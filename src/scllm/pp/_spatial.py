"""Finding spatially variable genes."""

from __future__ import annotations

import warnings

import numpy as np
from anndata import AnnData
from scipy import sparse

from scllm import _keys
from scllm._checks import check_adata
from scllm._log import log, warn
from scllm._results import record
from scllm._typing import CSR, FloatArray
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.data.spots import sections_of, spot_graph, spot_positions
from scllm.data.targets import normalised

__all__ = ["spatially_variable"]

# spot graph of squidpy.gr.spatial_neighbors
_GRAPH = "spatial_connectivities"


@closes_files
def spatially_variable(
    adata: AnnData,
    *,
    n_top_genes: int = 1000,
    layer: str | None = None,
    library_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Find the genes whose expression varies most smoothly over the tissue.

    The score is Moran's I (Moran, *Biometrika* 1950, doi:10.1093/biomet/37.1-2.17) on the graph of neighbouring spots,
    computed by ``scanpy.metrics.morans_i``: about 0 for a gene without spatial structure, 1 for a perfectly smooth one.
    Counts are first normalised to 10,000 per spot and log-transformed; other values are used as they are. Spots are
    neighbours if they are at most 1.5 times the distance between spots apart. A graph that
    ``squidpy.gr.spatial_neighbors`` has written is used instead if there is one.

    Parameters
    ----------
    adata
        Spots by genes, with ``obsm["spatial"]``.
    n_top_genes
        Number of genes to mark.
    layer
        Layer to read. ``None``: ``X``.
    library_key
        Column of ``obs`` that names the section of each spot, so that spots of different sections are never neighbours.
        ``None``: the column whose values are the keys of ``uns["spatial"]``, or one section if it has at most one key.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.var["morans_i"]``
        Moran's I; NaN for a gene with the same value in all spots.
    ``adata.var["spatially_variable"]``
        Whether the gene is one of the ``n_top_genes``.
    ``adata.uns["scllm"]["spatially_variable"]``
        ``params``, and the number of genes with no variation as ``n_constant``.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=1, side=10)
    >>> scllm.pp.spatially_variable(adata, n_top_genes=20)
    >>> int(adata.var["spatially_variable"].sum())
    20
    """
    check_adata(adata, copy)
    if n_top_genes < 1:
        raise ValueError(f"Expected n_top_genes of at least 1, got {n_top_genes}. Pass a larger number.")
    section = sections_of(adata.obs, adata.uns.get(_keys.SPATIAL, {}), library_key)
    xy = spot_positions(adata.obsm, adata.obs_names)
    graph = adata.obsp[_GRAPH].tocsr() if _GRAPH in adata.obsp else spot_graph(xy, section)
    if not graph.nnz:
        raise ValueError(
            f"Expected spots with neighbours, but none of {adata.n_obs} spots has one. Check obsm['spatial'] and "
            "library_key."
        )
    source = open_source(adata, layer=layer)
    log.info("computing Moran's I of %d genes over %d pairs of neighbouring spots", adata.n_vars, graph.nnz // 2)
    score = _morans_i(graph, normalised(source, np.arange(source.n_obs)))
    n_constant = int(np.isnan(score).sum())
    n_there = adata.n_vars - n_constant
    if n_there < n_top_genes:
        warn(
            f"Only {n_there} of {adata.n_vars} genes vary between spots, so that {n_there} genes are marked and not "
            f"n_top_genes={n_top_genes}. Pass a smaller number if that is not what you want."
        )
    top = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[: min(n_top_genes, n_there)]

    adata = adata.copy() if copy else adata
    adata.var[_keys.MORANS_I] = score
    adata.var[_keys.SPATIALLY_VARIABLE] = np.isin(np.arange(adata.n_vars), top)
    params = {"n_top_genes": n_top_genes, "layer": layer, "library_key": library_key}
    record(adata, "spatially_variable", params, n_constant=n_constant)
    return adata if copy else None


def _morans_i(graph: CSR, values: CSR) -> FloatArray:
    import scanpy as sc

    genes = sparse.csr_matrix(values.T, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ variables were constant")  # counted in uns instead
        return np.asarray(sc.metrics.morans_i(sparse.csr_matrix(graph, dtype=np.float64), genes))
