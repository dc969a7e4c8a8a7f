"""Ranking each cell's expressed genes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scllm import _keys
from scllm._checks import check_adata, missing_key
from scllm._results import free_key, record, record_name
from scllm._typing import FloatArray
from scllm.data.checks import check_source, layer_with_counts
from scllm.data.genes import check_unique
from scllm.data.medians import exact_medians
from scllm.data.opened import closes_files
from scllm.data.source import open_source, places_in_source
from scllm.kernels.ranking import rank_rows, scaled
from scllm.pp._stored import stored_rows

__all__ = ["rank_expression"]


@closes_files
def rank_expression(
    adata: AnnData,
    *,
    medians: Mapping[str, float] | pd.Series | str | None = None,
    layer: str | None = None,
    key_added: str = _keys.RANKED,
    copy: bool = False,
) -> AnnData | None:
    """Rank each cell's expressed genes by their count divided by the gene's median (Theodoris et al. 2023).

    Dividing by the median lowers the rank of genes that are high in every cell, and raises that of genes that
    distinguish cells. The depth of a cell does not change its ranks. Genes that are not expressed have no rank; equal
    values are ranked in the order of ``var_names``.

    Parameters
    ----------
    adata
        Cells by genes, raw counts.
    medians
        Non-zero median of each gene's normalised counts, by its name in ``var_names``, or the name of a column of
        ``var`` that holds them. ``None`` computes them from these data, see :func:`gene_medians`. Genes without a
        median get no rank.
    layer
        Layer to read; ``None`` is ``X``. For ``"raw"`` (``adata.raw``), only the genes of ``adata`` are ranked.
    key_added
        Layer to write.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.layers[key_added]``
        Ranks (CSR, int32): 1 for the gene with the highest value relative to its median; genes that are not expressed
        are not stored.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.rank_expression(adata)
    >>> bool(adata.layers["ranked"][0].max() == (adata.X[0] > 0).sum())
    True
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "layers", key_added)
    check_unique(adata.var_names)
    source = open_source(adata, layer=layer)
    places = places_in_source(adata, source)
    check_source(source, needs_counts=True, layer=layer, hint=lambda: layer_with_counts(adata, layer))
    adata = adata.copy() if copy else adata
    matrix = stored_rows(adata, source, layer)
    # computed on all genes that are read, because cells are scaled by their total count
    scale = exact_medians(matrix, target_sum=1e4) if medians is None else None
    if places is not None:
        matrix = matrix[:, places].sorted_indices()
        scale = None if scale is None else scale[places]
    if scale is None:
        scale = _aligned(medians, adata)
    if np.isnan(scale[matrix.indices]).any():
        matrix = sparse.csr_matrix(matrix.multiply(np.isfinite(scale)))
        matrix.eliminate_zeros()
        matrix.sort_indices()
    ranks = rank_rows(matrix.indptr, scaled(matrix.data, matrix.indices, scale))
    # the layer gets its own indices and indptr, so that changing X in place does not change it
    structure = matrix.indices.copy(), matrix.indptr.copy()
    adata.layers[key] = sparse.csr_matrix((ranks, *structure), shape=matrix.shape)
    record_name(adata, "layers", key_added)
    record(adata, "rank_expression", {"with_medians": medians is not None, "layer": layer, "key_added": key})
    return adata if copy else None


def _aligned(medians: Mapping[str, float] | pd.Series | str, adata: AnnData) -> FloatArray:
    """Return the median of each gene of ``adata``, NaN if it has none."""
    names = adata.var_names
    if isinstance(medians, str):
        if medians not in adata.var:
            raise missing_key(medians, adata.var.columns, "a column of adata.var", "Call pp.gene_medians(adata) first.")
        medians = adata.var[medians]
    if not isinstance(medians, (Mapping, pd.Series)):
        raise TypeError(
            "Expected medians to be a Series or dict by gene, or the name of a column of adata.var, got "
            f"{type(medians).__name__}. Pass for example pd.Series(medians, index=adata.var_names)."
        )
    medians = pd.Series(medians, dtype=np.float64)
    check_unique(medians.index)
    found = medians.reindex(names).to_numpy()
    if not np.isfinite(found).any():
        first = next(iter(medians.keys()), None)
        raise ValueError(
            f"Expected medians named as in adata.var_names, but none of the {len(names)} genes has one (first gene: "
            f"{names[0]!r}, first median: {first!r}). Rename the medians."
        )
    if (found <= 0).any():
        raise ValueError(
            f"Expected medians above zero, got {np.nanmin(found):g} for {names[np.nanargmin(found)]!r}. Leave that "
            "gene out of the medians."
        )
    return found
