"""Aligning genes to a vocabulary."""

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
from scllm.data.source import open_source
from scllm.data.vocab import Vocab

__all__ = ["HasVocab", "match_genes"]

_LOST_SHOWN = 50


class HasVocab(Protocol):
    """A model: only its vocabulary is read."""

    vocab: Vocab


def match_genes(
    adata: AnnData,
    vocab: Vocab | HasVocab | Iterable[str] | str | PathLike[str],
    *,
    gene_key: str | None = None,
    min_coverage: float = 0.3,
    copy: bool = False,
) -> AnnData | None:
    """Align genes to a vocabulary, and say how much of the data it covers.

    Finds out whether names are symbols or Ensembl ids, strips version suffixes, and looks in the usual columns of
    ``var``, then in all others that hold text. Names that are spelt otherwise (``GRCh38_TP53``, ``ENSG...|TP53``,
    ``HLA.A``, blanks) are mended where they can mean one gene only, and the log says how many were.
    Symbols are found among Ensembl ids if the vocabulary has them as aliases, as a Geneformer model has that was loaded
    with its dictionary of symbols. Verbs that take a model do the same by themselves; call this to look at the result,
    or to choose ``gene_key`` and ``min_coverage``, which later verbs take over.

    Parameters
    ----------
    adata
        Cells by genes.
    vocab
        A vocabulary, a model, a list of names, or a file or model folder that holds a vocabulary.
    gene_key
        Column of ``adata.var`` with gene names, or ``"var_names"``; ``None`` takes the one that fits best.
    min_coverage
        Least share of matched genes, of the smaller of (genes in the data, genes in the vocabulary).
    copy
        Return a changed copy in place of changing ``adata``.

    Writes
    ------
    ``adata.var["token_id"]``
        Token of each gene, -1 where there is none.
    ``adata.uns["scllm"]["match_genes"]``
        ``column`` and ``id_type`` of the names, ``n_matched``, ``n_data``, ``n_vocab`` and ``coverage``; ``n_mended``
        names that were spelt otherwise; ``table`` with the most expressed genes lost.

    Raises
    ------
    ValueError
        Below ``min_coverage``, or with duplicated ``var_names``.

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
        adata, "match_genes", {"gene_key": gene_key, "min_coverage": min_coverage}, lost,
        column=found.column, id_type=found.id_type, n_matched=found.n_matched, n_data=adata.n_vars,
        n_vocab=found.n_vocab, coverage=found.coverage, n_mended=0 if found.mended is None else found.mended.n,
    )  # fmt: skip
    return adata if copy else None


def _vocabulary(given: Vocab | HasVocab | Iterable[str] | str | PathLike[str]) -> Vocab:
    if isinstance(given, Vocab):
        return given
    if hasattr(given, "vocab"):
        return given.vocab
    if isinstance(given, (str, PathLike)):
        return _read(Path(given))
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
    """The most expressed genes that the vocabulary does not have; names are enough, expression need not be there."""
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
