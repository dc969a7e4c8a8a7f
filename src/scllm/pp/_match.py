"""Matching genes to a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata
from scllm._results import record
from scllm.data import genes
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.data.vocab import Vocab

__all__ = ["HasVocab", "match_genes"]

_LOST_SHOWN = 50


class HasVocab(Protocol):
    """A model, of which only the vocabulary is used."""

    vocab: Vocab


@closes_files
def match_genes(
    adata: AnnData,
    vocab: Vocab | HasVocab | Iterable[str] | str | PathLike[str],
    *,
    gene_key: str | None = None,
    min_coverage: float = 0.3,
    copy: bool = False,
) -> AnnData | None:
    """Match genes to a vocabulary, and report how many of them it covers.

    Recognises symbols and Ensembl ids, strips version suffixes, and searches the usual columns of ``var``, then all
    other columns that hold text. Names that are spelt differently (``GRCh38_TP53``, ``ENSG...|TP53``, ``HLA.A``,
    blanks) are corrected if only one gene can be meant, and the number of corrections is logged. Symbols match Ensembl
    ids if the vocabulary has them as aliases; a Geneformer model that was loaded with its dictionary of symbols does.

    Functions that take a model match genes by themselves. Call this function to inspect the result, or to choose
    ``gene_key`` and ``min_coverage``, which later calls then use.

    Parameters
    ----------
    adata
        Cells by genes.
    vocab
        A vocabulary, a model, a list of names, or a file or model folder that holds a vocabulary.
    gene_key
        Column of ``adata.var`` with gene names, or ``"var_names"``; ``None`` uses the column that matches best.
    min_coverage
        Smallest coverage that is accepted: the number of matched genes, divided by the number of genes in the data or
        in the vocabulary, whichever is smaller.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.var["token_id"]``
        Token of each gene, -1 if it has none.
    ``adata.uns["scllm"]["match_genes"]``
        ``column`` and ``id_type`` of the names, ``n_matched``, ``n_data``, ``n_vocab`` and ``coverage``; ``n_mended``,
        the number of names whose spelling was corrected; ``table``, the most expressed genes without a token.

    Raises
    ------
    ValueError
        If coverage is below ``min_coverage``, or if ``var_names`` are duplicated.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.match_genes(adata, list(adata.var_names[:30]))
    >>> int((adata.var["token_id"] >= 0).sum())
    30
    """
    check_adata(adata, copy)
    vocab = _vocabulary(vocab)
    found = genes.match(adata.var_names, vocab, var=adata.var, gene_key=gene_key, min_coverage=min_coverage)
    lost = _lost(adata, found.token_ids)
    adata = adata.copy() if copy else adata
    adata.var[_keys.TOKEN_ID] = found.token_ids
    record(
        adata,
        "match_genes",
        {"gene_key": gene_key, "min_coverage": min_coverage},
        lost,
        column=found.column,
        id_type=found.id_type,
        n_matched=found.n_matched,
        n_data=adata.n_vars,
        n_vocab=found.n_vocab,
        coverage=found.coverage,
        n_mended=0 if found.mended is None else found.mended.n,
    )
    return adata if copy else None


def _vocabulary(given: Vocab | HasVocab | Iterable[str] | str | PathLike[str]) -> Vocab:
    if isinstance(given, Vocab):
        return given
    if hasattr(given, "vocab"):
        return given.vocab
    if isinstance(given, (str, PathLike)):
        return _read(Path(given))
    if hasattr(given, "var_names"):
        raise TypeError(
            f"Expected a vocabulary, a model or gene names, got an object of type {type(given).__name__}. "
            "Pass the var_names of the other AnnData."
        )
    return Vocab.from_genes(given)


def _read(path: Path) -> Vocab:
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a vocabulary file or a model folder, but {path} does not exist. Check the path."
        )
    if (path / "spec.json").is_file():
        path = path / "model"
    file = path / "vocab.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"Expected vocab.json in {path}. Pass a model folder or the vocabulary file itself.")
    return Vocab.read(file)


def _lost(adata: AnnData, token_ids: np.ndarray) -> pd.DataFrame:
    """List the most expressed genes that are not in the vocabulary; works without X too, as only names are needed."""
    total = np.full(adata.n_vars, np.nan)
    if adata.X is not None:
        source, total = open_source(adata), np.zeros(adata.n_vars)
        for start in range(0, source.n_obs, 4096):
            total += np.asarray(source.read(np.arange(start, min(start + 4096, source.n_obs))).sum(0)).ravel()
    lost = np.flatnonzero(token_ids < 0)
    most = lost[np.argsort(-total[lost], kind="stable")][:_LOST_SHOWN]
    return pd.DataFrame(
        {"gene": adata.var_names[most].astype(str), "mean_expression": total[most] / max(1, adata.n_obs)}
    )
