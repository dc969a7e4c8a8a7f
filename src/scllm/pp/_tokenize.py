"""Writing the token sequences that a model would read."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from typing import Literal, Protocol

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scllm import _keys
from scllm._checks import check_adata
from scllm._results import free_key, match_settings, record, record_name
from scllm.data import genes
from scllm.data.checks import check_source, layer_with_counts, read_checked, warn_of_empty_cells
from scllm.data.encode import BinEncoder, Encoder, RankEncoder, ValueEncoder
from scllm.data.medians import token_medians
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

__all__ = ["tokenize"]


class _Model(Protocol):
    vocab: Vocab
    encoder: Encoder


@closes_files
def tokenize(
    adata: AnnData,
    *,
    encoder: Literal["bins", "ranks", "values"] | Encoder = "bins",
    model: _Model | str | PathLike[str] | None = None,
    vocab: Vocab | None = None,
    max_len: int | None = None,
    layer: str | None = None,
    key_added: str = _keys.TOKENS,
    random_state: int = 0,
    copy: bool = False,
) -> AnnData | None:
    """Write the token sequences that a model would read, for inspection.

    Models encode data by themselves and do not need this.

    Parameters
    ----------
    adata
        Cells by genes.
    encoder
        ``"bins"`` (scGPT), ``"ranks"`` (Geneformer, relative to the gene medians of these cells), ``"values"``
        (log-normalised expression), or an encoder object.
    model
        A model, or the path of one, whose encoder and vocabulary are used instead of ``encoder`` and ``vocab``.
    vocab
        Vocabulary; ``None`` makes one from all genes.
    max_len
        Longest token sequence, special tokens included; ``None`` uses that of the encoder. Longer cells are truncated
        to their highest values; of equal values, those with the lowest token ids are kept.
    layer
        Layer to read; ``None`` is ``X``.
    key_added
        Key in ``obsm``.
    random_state
        Random seed for random ties.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.obsm[key_added]``, ``adata.obsm[key_added + "_values"]``
        Token ids and their values (CSR, with one column per position in the token sequence); ranks have no values.
    ``adata.uns["scllm"]["tokenize"]``
        Vocabulary, special tokens and settings.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.tokenize(adata)
    >>> adata.obsm["tokens"].shape[0] == adata.n_obs
    True
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "obsm", key_added)
    settings = match_settings(adata)
    if model is not None:
        found = _loaded(model) if isinstance(model, (str, PathLike)) else model
        encoder, vocab = found.encoder, found.vocab
    elif vocab is None:
        settings = {"gene_key": "var_names"}
    elif not isinstance(vocab, Vocab):
        raise TypeError(
            f"Expected vocab to be a Vocab, got {type(vocab).__name__}. Make one from names: Vocab.from_genes(names)."
        )
    encode = _encoder(encoder)
    if max_len is not None:
        encode = replace(encode, max_len=max_len)  # type: ignore[type-var]
    source = open_source(adata, layer=layer)
    vocab = Vocab.from_genes(source.genes) if vocab is None else vocab
    check_source(source, needs_counts=encode.needs_counts, layer=layer, hint=lambda: layer_with_counts(adata, layer))
    match = genes.match(source.genes, vocab, var=source.var, **settings)
    if encoder == "ranks":
        medians = token_medians(source, match, np.arange(adata.n_obs), len(vocab))
        encode = replace(encode, medians=medians)  # type: ignore[type-var]
    blocks, n_empty = [], 0
    for start in range(0, adata.n_obs, 4096):
        counts = match.tokens(read_checked(source, np.arange(start, min(start + 4096, adata.n_obs))))
        n_empty += int((counts.lengths == 0).sum())
        blocks.append(encode(counts, vocab, measured=match.measured, random_state=random_state))
    warn_of_empty_cells(n_empty, adata.n_obs)
    adata = adata.copy() if copy else adata
    tokens = Tokens.stacked(blocks)
    adata.obsm[key] = _by_position(tokens, tokens.genes)
    if tokens.values is None:
        adata.obsm.pop(key + _keys.TOKEN_VALUES, None)  # left by an earlier call
    else:
        adata.obsm[key + _keys.TOKEN_VALUES] = _by_position(tokens, tokens.values)
    params = {
        "encoder": encode,
        "kind": type(encode).__name__,
        "layer": layer,
        "key_added": key,
        "specials": vocab.specials,
        "cls": vocab.cls,
        "pad": vocab.pad,
        "pad_id": -1 if vocab.pad is None else vocab.pad_id,
    }
    record_name(adata, "obsm", key_added)
    record(adata, "tokenize", params, pd.DataFrame({"token": list(vocab.tokens)}))
    return adata if copy else None


def _loaded(path: str | PathLike[str]) -> _Model:
    from scllm import models  # torch is imported only where a model has to be read

    return models.load(path)


def _encoder(named: str | Encoder) -> Encoder:
    match named:
        case "bins":
            return BinEncoder()
        case "ranks":
            return RankEncoder()
        case "values":
            return ValueEncoder()
        case str():
            raise ValueError(
                f"Expected encoder to be 'bins', 'ranks', 'values' or an encoder object, got {named!r}. Pass one of "
                "those."
            )
    return named


def _by_position(tokens: Tokens, content: np.ndarray) -> sparse.csr_matrix:
    positions = np.arange(len(content)) - np.repeat(tokens.indptr[:-1], tokens.lengths)
    shape = (len(tokens), int(tokens.lengths.max(initial=0)))
    # copied, because two matrices are made from the same tokens and must not share arrays
    return sparse.csr_matrix((content, positions, tokens.indptr.copy()), shape=shape)
