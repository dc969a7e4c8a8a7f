"""Non-zero medians of genes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata
from scllm._results import free_key, record, record_name
from scllm.data.checks import check_source, layer_with_counts
from scllm.data.genes import check_unique
from scllm.data.medians import exact_medians, streamed_medians
from scllm.data.source import CellSource, open_source
from scllm.pp._stored import stored_rows

__all__ = ["gene_medians"]


def gene_medians(
    data: AnnData | str | PathLike[str] | CellSource | Sequence[str | PathLike[str]],
    *,
    layer: str | None = None,
    target_sum: float = 1e4,
    key_added: str = _keys.MEDIANS,
    copy: bool = False,
) -> AnnData | pd.Series | None:
    """Median of each gene's normalised counts over the cells that express it.

    What Geneformer ranks genes relative to. Cells are scaled to the same total first. An AnnData in memory gets exact
    medians; data on disk (a path, or backed) are read once, in row chunks, and get medians right to within 1/128.

    Parameters
    ----------
    data
        An AnnData; a path to ``.h5ad`` or ``.zarr``, or a list of those.
    layer
        Layer to read; ``None`` is ``X``.
    target_sum
        Counts that each cell is scaled to, over all its genes.
    key_added
        Column of ``var`` to write.
    copy
        Return a changed copy in place of changing ``data``.

    Returns
    -------
    For data given as a path a Series by gene, NaN where no cell expresses it; else ``None`` or the changed copy.

    Writes
    ------
    ``adata.var[key_added]``
        Medians, NaN where no cell expresses the gene.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.gene_medians(adata)
    >>> bool((adata.var["median_expression"] > 0).all())
    True
    """
    if not 0 < target_sum < np.inf:
        raise ValueError(f"target_sum is {target_sum}, a finite number above zero expected. Geneformer uses 1e4.")
    if isinstance(data, AnnData):
        check_adata(data, copy, key_added)
        free_key(data, "var", key_added)
    source = open_source(data, layer=layer)
    check_unique(source.genes)
    check_source(source, needs_counts=True, layer=layer, hint=lambda: layer_with_counts(data))
    if not isinstance(data, AnnData):
        if copy:
            raise TypeError("copy=True goes with an AnnData, a path was given: its medians are returned. Leave it out.")
        return pd.Series(streamed_medians(source, target_sum=target_sum), index=source.genes, name=key_added)
    is_on_disk = data.isbacked and layer is None
    adata = data.copy() if copy else data
    if is_on_disk:
        medians = streamed_medians(source, target_sum=target_sum)
    else:
        medians = exact_medians(stored_rows(adata, source, layer), target_sum=target_sum)
    key = _keys.safe(key_added)
    adata.var[key] = medians
    record_name(adata, "var", key_added)
    record(adata, "gene_medians", {"layer": layer, "target_sum": target_sum, "key_added": key})
    return adata if copy else None
