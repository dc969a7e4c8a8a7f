"""Read scllm's results from AnnData."""

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
    """Return token ids and values as padded arrays, in the format of scGPT's code.

    Parameters
    ----------
    adata
        An AnnData after :func:`scllm.pp.tokenize`.
    key
        The ``key_added`` of ``tokenize``.
    length
        Number of columns; longer token sequences are truncated. ``None``: the length of the longest sequence.
    pad_value
        Value of padding tokens.

    Returns
    -------
    Genes and values, each ``(n_cells, length)``: ``<cls>`` first, then genes, then padding (the vocabulary's pad id and
    ``pad_value``). Values are ``None`` if tokens have no values, as for ranked genes.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.tokenize(adata)
    >>> genes, values = scllm.get.tokens(adata, length=10)
    >>> genes.shape == values.shape == (adata.n_obs, 10)
    True
    """
    key = _keys.safe(key)
    settings = recorded(adata, "tokenize", made_by="pp.tokenize")["params"]
    if key not in adata.obsm:
        raise missing_key(key, adata.obsm, "in adata.obsm", f"Call pp.tokenize(adata, key_added={key!r}) first.")
    last = str(settings["key_added"])
    if last != key:
        raise ValueError(
            f"Expected key_added={key!r} in the last call of pp.tokenize, got {last!r}. Their vocabularies, and so the "
            f"padding tokens, may differ: call pp.tokenize(adata, key_added={key!r}) again."
        )
    genes = _padded(adata.obsm[key], length, int(settings["pad_id"]))
    values = adata.obsm.get(key + _keys.TOKEN_VALUES)
    return genes, None if values is None else _padded(values, length, pad_value)


def _padded(rows: CSR, length: int | None, fill: float) -> NDArray[np.generic]:
    """Pad or truncate token sequences whose column is the position."""
    lengths = np.diff(rows.indptr)
    out = np.full((len(lengths), lengths.max(initial=0) if length is None else length), fill, rows.dtype)
    cell = np.repeat(np.arange(len(lengths)), lengths)
    there = rows.indices < out.shape[1]
    out[cell[there], rows.indices[there]] = rows.data[there]
    return out
