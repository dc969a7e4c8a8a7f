"""Blood cells that need no download."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scllm import _keys

__all__ = ["pbmc68k"]

_TARGET_SUM = 1e4
_ROUNDING_DISTANCE = 0.1


def pbmc68k() -> AnnData:
    """Load 700 labelled blood cells with raw counts of 765 genes, from the copy that comes with scanpy.

    That copy holds log values rounded to three decimals, from which the counts are recovered exactly: with the cell's
    total ``n`` over all genes, a count is ``expm1(value) * n / 1e4``, which is always within 0.082 of an integer. The
    data are from Zheng et al., *Nature Communications* 2017, doi:10.1038/ncomms14049. Nothing is downloaded.

    Returns
    -------
    700 cells x 765 genes: counts in ``X`` (CSR float32), ``obs["cell_type"]`` (10 types), ``obs["louvain"]`` (11
    clusters), gene symbols in ``var_names`` and ``var["gene_symbol"]``.

    Examples
    --------
    >>> import scllm
    >>> scllm.datasets.pbmc68k()
    AnnData object with n_obs × n_vars = 700 × 765
        obs: 'cell_type', 'louvain'
        var: 'gene_symbol'
    """
    import scanpy as sc

    packaged = sc.datasets.pbmc68k_reduced()
    logged = packaged.raw.X
    n_counts = packaged.obs["n_counts"].to_numpy(np.float64)
    counts = sparse.csr_matrix(
        (_recover_counts(logged.data, np.repeat(n_counts, np.diff(logged.indptr))), logged.indices, logged.indptr),
        shape=logged.shape,
    )
    counts.sort_indices()
    obs = pd.DataFrame(
        {_keys.CELL_TYPE: packaged.obs["bulk_labels"], _keys.LOUVAIN: packaged.obs["louvain"]},
        index=packaged.obs_names.rename(None),
    )
    genes = packaged.raw.var_names.rename(None)
    return AnnData(counts, obs=obs, var=pd.DataFrame({_keys.GENE_SYMBOL: genes}, index=genes))


def _recover_counts(logged: np.ndarray, n_counts: np.ndarray) -> np.ndarray:
    """Recover integers from ``log1p(count / n_counts * 1e4)``, as float32; raise if rounding would be a guess."""
    scaled = np.expm1(logged.astype(np.float64)) * n_counts / _TARGET_SUM
    counts = np.rint(scaled)
    distance = np.abs(scaled - counts).max()
    if not distance < _ROUNDING_DISTANCE:
        raise ValueError(
            f"Expected values within {_ROUNDING_DISTANCE} of a count, got one at a distance of {distance:.3g}. The "
            "data of this version of scanpy differ from those that scllm knows: install another version of scanpy."
        )
    return counts.astype(np.float32)
