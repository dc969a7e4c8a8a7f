"""Computing non-zero medians of genes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata
from scllm._results import free_key, match_settings, record, record_name
from scllm._typing import FloatArray
from scllm.data.cells import CellSource
from scllm.data.checks import check_source, layer_with_counts
from scllm.data.genes import GeneMatch, check_unique, name_columns, strip_version
from scllm.data.genes import match as match_names
from scllm.data.medians import exact_medians, streamed_medians, token_medians
from scllm.data.opened import closes_files
from scllm.data.source import has_layer, open_source
from scllm.data.vocab import Vocab
from scllm.pp._stored import stored_rows

__all__ = ["gene_medians"]


@closes_files
def gene_medians(
    data: AnnData | str | PathLike[str] | CellSource | Sequence[str | PathLike[str]],
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    target_sum: float = 1e4,
    key_added: str = _keys.MEDIANS,
    copy: bool = False,
) -> AnnData | pd.Series | None:
    """Compute the median of each gene's normalised counts over the cells that express it.

    Geneformer ranks genes relative to these medians. Cells are first scaled to the same total count. Medians are exact
    for an AnnData in memory. Data on disk (a path, or backed) are read once, in row chunks, and their medians are
    accurate to within 1/128.

    Parameters
    ----------
    data
        An AnnData, a path to ``.h5ad`` or ``.zarr``, or a list of paths.
    layer
        Layer to read; ``None`` is ``X``.
    gene_key
        Column of ``var`` with gene names. Rows of ``var`` that share a name are treated as one gene, and their counts
        are summed. ``None`` uses that of an earlier :func:`match_genes`, otherwise ``"var_names"``.
    min_coverage
        Smallest fraction of genes that must have a name in ``gene_key``. ``None`` uses that of an earlier
        :func:`match_genes`, otherwise 0.3.
    target_sum
        Total count that each cell is scaled to, over all its genes.
    key_added
        Column of ``var`` to write.
    copy
        Return a changed copy instead of changing ``data``.

    Returns
    -------
    For data given as a path, a Series of medians indexed by gene (by its name in ``gene_key``), NaN if no cell
    expresses the gene. Otherwise ``None`` or the changed copy.

    Writes
    ------
    ``adata.var[key_added]``
        Medians, NaN if no cell expresses the gene.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.gene_medians(adata)
    >>> bool((adata.var["median_expression"] > 0).all())
    True
    """
    if not 0 < target_sum < np.inf:
        raise ValueError(
            f"Expected target_sum to be a finite number above zero, got {target_sum}. Geneformer uses 1e4."
        )
    if isinstance(data, AnnData):
        check_adata(data, copy, key_added)
        free_key(data, "var", key_added)
    source = open_source(data, layer=layer)
    check_unique(source.genes)
    check_source(source, needs_counts=True, layer=layer, hint=lambda: layer_with_counts(data, layer))
    if copy and not isinstance(data, AnnData):
        raise TypeError(
            f"Expected an AnnData with copy=True, got {type(data).__name__}, whose medians are returned. Leave copy= "
            "out."
        )
    named, match = _genes(source, **match_settings(data, gene_key, min_coverage))
    if not isinstance(data, AnnData):
        return pd.Series(_streamed(source, match, len(named), target_sum), index=named, name=key_added)
    adata = data.copy() if copy else data
    if data.isbacked and (layer is None or not has_layer(data, layer)):
        medians = _streamed(source, match, len(named), target_sum)
    else:
        matrix = stored_rows(adata, source, layer)
        medians = exact_medians(matrix, target_sum=target_sum, match=match, n_tokens=len(named))
    if match is not None:
        medians = np.append(medians, np.nan)[match.token_ids]  # rows without a name are -1, which is the NaN
    key = _keys.safe(key_added)
    # the genes of .raw can differ from those of adata
    adata.var[key] = pd.Series(medians, source.genes).reindex(adata.var_names).to_numpy()
    record_name(adata, "var", key_added)
    record(
        adata,
        "gene_medians",
        {
            "layer": layer,
            "gene_key": gene_key,
            "min_coverage": min_coverage,
            "target_sum": target_sum,
            "key_added": key,
        },
    )
    return adata if copy else None


def _genes(source: CellSource, gene_key: str | None, min_coverage: float) -> tuple[pd.Index, GeneMatch | None]:
    """Find the names of the genes and the gene of each row of ``var``; ``None`` if every row is a separate gene."""
    if gene_key in (None, "var_names"):
        return source.genes, None
    (names,) = name_columns(source.genes, source.var, gene_key).values()
    lacks_name = source.var[gene_key].isna().to_numpy() | (np.array(names, object) == "")
    if 1 - lacks_name.mean() < min_coverage or lacks_name.all():
        raise ValueError(
            f"Only {int((~lacks_name).sum())} of {len(names)} genes ({100 * (1 - lacks_name.mean()):.3g} %) have a "
            f"name in var[{gene_key!r}]; at least {100 * min_coverage:.3g} % are needed. Pass another gene_key."
        )
    named = pd.Index(dict.fromkeys(np.array(strip_version(names), object)[~lacks_name]))
    return named, match_names(source.genes, Vocab.from_genes(named), var=source.var, gene_key=gene_key)


def _streamed(source: CellSource, match: GeneMatch | None, n_genes: int, target_sum: float) -> FloatArray:
    if match is None:
        return streamed_medians(source, target_sum=target_sum)
    return token_medians(source, match, np.arange(source.n_obs), n_genes) * (target_sum / 1e4)
