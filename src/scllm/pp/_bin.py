"""Binning each cell's expressed genes by quantiles."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from scipy import sparse

from scllm import _keys
from scllm._checks import check_adata
from scllm._results import free_key, record, record_name
from scllm.data.checks import check_source
from scllm.data.encode.bins import Ties, check_n_bins, check_ties, tie_draws
from scllm.data.genes import check_unique
from scllm.data.opened import closes_files
from scllm.data.source import open_source, places_in_source
from scllm.data.tokens import Tokens
from scllm.kernels.binning import bin_rows
from scllm.pp._stored import stored_rows

__all__ = ["bin_expression"]


@closes_files
def bin_expression(
    adata: AnnData,
    *,
    n_bins: int = 51,
    layer: str | None = None,
    ties: Ties = "middle",
    key_added: str = _keys.BINNED,
    random_state: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Sort each cell's expressed genes into bins of equal size, as scGPT does (doi:10.1038/s41592-024-02201-0).

    Bins are relative to the cell, so they are comparable across sequencing depths. Zeros stay zero and are not stored;
    expressed genes get 1 to ``n_bins - 1``. Counts take few distinct values, so most of them span several bins;
    ``ties`` decides which of these they get.

    Parameters
    ----------
    adata
        Cells by genes; counts, normalised and log-transformed values give the same bins.
    n_bins
        Number of bins, the zero bin included. More bins keep more of the dynamic range but need more data.
    layer
        Layer to bin; ``None`` is ``X``. For ``"raw"`` (``adata.raw``), only the genes of ``adata`` are binned.
    ties
        Bin of a value that spans several: the ``"middle"`` one, the lowest (``"left"``), the highest (``"right"``), or
        one drawn at ``"random"`` as in scGPT. Random ties add noise that no model can predict.
    key_added
        Layer to write.
    random_state
        Random seed for random ties. They also depend on which genes the cell expresses, but not on its position.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.layers[key_added]``
        Bins (CSR, uint8 for up to 256 bins, otherwise uint16). The layer shares no arrays with its input, so changing
        the input later, for example with :func:`scanpy.pp.downsample_counts`, does not change it.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.bin_expression(adata, n_bins=11)
    >>> int(adata.layers["binned"].max())
    10
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "layers", key_added)
    check_n_bins(n_bins)
    check_ties(ties)
    check_unique(adata.var_names)
    source = open_source(adata, layer=layer)
    places = places_in_source(adata, source)
    check_source(source, needs_counts=False, layer=layer)
    adata = adata.copy() if copy else adata
    matrix = stored_rows(adata, source, layer)
    if places is not None:
        matrix = matrix[:, places].sorted_indices()
    draws = None
    if ties == "random":
        draws = tie_draws(Tokens(matrix.indptr, matrix.indices, matrix.data), None, random_state)
    dtype = np.uint8 if n_bins <= 256 else np.uint16
    bins = bin_rows(matrix.indptr, matrix.data, n_bins=n_bins, ties=ties, draws=draws, dtype=dtype)
    # the layer gets its own indices and indptr, so that changing X in place does not change it
    structure = matrix.indices.copy(), matrix.indptr.copy()
    adata.layers[key] = sparse.csr_matrix((bins, *structure), shape=matrix.shape)
    params = {"n_bins": n_bins, "layer": layer, "ties": ties, "key_added": key, "random_state": random_state}
    record_name(adata, "layers", key_added)
    record(adata, "bin_expression", params)
    return adata if copy else None
