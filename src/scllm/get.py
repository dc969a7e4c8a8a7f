"""Taking scllm's results out of AnnData."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from scllm import _keys
from scllm._checks import missing_key
from scllm._results import recorded
from scllm._typing import CSR, IntArray

__all__ = ["tokens"]


def tokens(
    adata: AnnData, *, key: str = _keys.TOKENS, length: int | None = None, pad_value: float = -2
) -> tuple[IntArray, NDArray[np.float32] | None]:
    """Token ids and values as padded arrays, as scGPT's code lays them out.

    Parameters
    ----------
    adata
        After :func:`scllm.pp.tokenize`.
    key
        What ``tokenize`` was given as ``key_added``.
    length
        Columns; ``None`` is the longest sentence. Longer sentences are cut at the end.
    pad_value
        Value of padding.

    Returns
    -------
    Genes and values, each ``(n_cells, length)``: ``<cls>`` first, then genes, then padding (the vocabulary's pad id and
    ``pad_value``). Values are ``None`` for rank sentences.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.tokenize(adata)
    >>> genes, values = scllm.get.tokens(adata, length=10)
    >>> genes.shape == values.shape == (adata.n_obs, 10)
    True
    """
    settings = recorded(adata, "tokenize", made_by="pp.tokenize")["params"]
    if key not in adata.obsm:
        raise missing_key(key, adata.obsm, "in adata.obsm", f"Call pp.tokenize(adata, key_added={key!r}) first.")
    last = str(settings["key_added"])
    if last != key:
        raise ValueError(
            f"pp.tokenize was last called with key_added={last!r}, {key!r} expected: vocabularies may differ, and the "
            f"padding token with them. Call pp.tokenize(adata, key_added={key!r}) again."
        )
    genes = _padded(adata.obsm[key], length, int(settings["pad_id"]))
    values = adata.obsm.get(key + _keys.TOKEN_VALUES)
    return genes, None if values is None else _padded(values, length, pad_value)


def _padded(rows: CSR, length: int | None, fill: float) -> NDArray[np.generic]:
    """Sentences whose column is the position, filled up or cut at the end."""
    lengths = np.diff(rows.indptr)
    out = np.full((len(lengths), lengths.max(initial=0) if length is None else length), fill, rows.dtype)
    cell = np.repeat(np.arange(len(lengths)), lengths)
    there = rows.indices < out.shape[1]
    out[cell[there], rows.indices[there]] = rows.data[there]
    return out
