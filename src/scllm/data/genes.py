"""Matching the genes of a data set to the tokens of a vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd

from scllm._checks import missing_key
from scllm._log import log
from scllm._typing import CSR, IntArray
from scllm.data.spelling import ENSEMBL, Mended, mend, strip_version
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.kernels.ragged import restrict, restrict_in_order, sum_repeats

__all__ = ["USUAL_COLUMNS", "GeneMatch", "check_unique", "id_type", "match", "name_columns", "strip_version"]

# a column that is not one of the usual ones must match at least this share of genes to be used without being named
_TAKEN = 0.3

# columns in which AnnData files of the usual sources (scanpy, CELLxGENE, 10x, Seurat exports) keep the other names
USUAL_COLUMNS = (
    "feature_name",
    "gene_symbol",
    "gene_symbols",
    "gene_name",
    "gene_names",
    "symbol",
    "gene_short_name",
    "ensembl_id",
    "feature_id",
    "gene_ids",
    "gene_id",
    "ensembl",
    "ensembl_ids",
)


@dataclass(frozen=True)
class GeneMatch:
    """Tokens of the genes of a data set in a vocabulary.

    Parameters
    ----------
    token_ids
        Token of each gene of the data, ``(n_genes,)`` int32, -1 if it is not in the vocabulary.
    column
        Where the names were found: ``"var_names"`` or a column of ``var``.
    id_type
        Kind of the names: ``"symbol"`` or ``"ensembl"``.
    n_vocab
        Number of genes in the vocabulary.
    files
        The match of each file, if files with different genes are read together. All of them have the same columns; a
        gene that a file did not measure is -1 there.
    file_of
        Index into ``files`` for each cell of the source.
    mended
        Names whose spelling was corrected.
    """

    token_ids: IntArray
    column: str
    id_type: Literal["symbol", "ensembl"]
    n_vocab: int
    files: tuple[GeneMatch, ...] = ()
    file_of: IntArray | None = field(default=None, repr=False)
    mended: Mended | None = field(default=None, compare=False, repr=False)

    @cached_property
    def n_matched(self) -> int:
        """Number of distinct genes of the vocabulary that are in the data."""
        return len(np.unique(self.token_ids[self.token_ids >= 0]))

    @property
    def coverage(self) -> float:
        """Number of matched genes, divided by the genes in the data or in the vocabulary, whichever are fewer."""
        return self.n_matched / max(1, min(len(self.token_ids), self.n_vocab))

    @cached_property
    def measured(self) -> IntArray:
        """Tokens of the genes in the data (in any of the files), each once, in ascending order."""
        if self.files:
            return np.unique(np.concatenate([file.measured for file in self.files]))
        return np.unique(self.token_ids[self.token_ids >= 0])

    def by_file(self, rows: IntArray) -> list[tuple[GeneMatch, IntArray]]:
        """Group cells of the source by file: the match of each file, and the positions of its cells in ``rows``."""
        if self.file_of is None:
            return [(self, np.arange(len(rows)))]
        file = self.file_of[rows]
        return [(self.files[i], np.flatnonzero(file == i)) for i in np.unique(file)]

    def of_genes(self, genes: pd.Index, wanted: pd.Index) -> IntArray:
        """Find the token of each wanted gene, -1 if it is not among ``genes``, the genes of the data."""
        place = genes.get_indexer(wanted)
        return np.where(place < 0, -1, self.token_ids[place])

    @cached_property
    def _order(self) -> tuple[IntArray, IntArray]:
        """Position of each matched column in the order of tokens (-1 for others), and the tokens in that order."""
        known = np.flatnonzero(self.token_ids >= 0)
        known = known[np.argsort(self.token_ids[known], kind="stable")]
        place = np.full(len(self.token_ids), -1, np.int32)
        place[known] = np.arange(len(known))
        return place, self.token_ids[known].astype(np.int32)

    @cached_property
    def _is_in_order(self) -> bool:
        """Whether the matched columns are already in the order of their tokens, without repeated tokens."""
        return bool((np.diff(self.token_ids[self.token_ids >= 0]) > 0).all())

    def tokens(self, counts: CSR, rows: IntArray | None = None) -> Tokens:
        """Convert counts to ragged rows over the vocabulary, each row in the order of its token ids.

        Zeros and genes that are not in the vocabulary are dropped. Counts of columns that share a token are summed in
        float64, from the lowest to the highest. Therefore the tokens of a cell depend on its genes and their counts,
        but not on the order of columns. Ties that are broken by position later are thus broken by token id.

        Parameters
        ----------
        counts
            CSR matrix with sorted columns and without duplicates, as sources return it.
        rows
            Positions of these cells in the source; needed if its files hold different genes.
        """
        if getattr(counts, "format", None) != "csr":
            kind = getattr(counts, "format", type(counts).__name__)
            raise TypeError(
                f"Expected counts as a CSR matrix, got {kind!r}. Convert them with scipy.sparse.csr_matrix."
            )
        if self.files:
            assert rows is not None
            by_file = self.by_file(rows)
            if len(by_file) <= 1:
                return (by_file[0][0] if by_file else self.files[0]).tokens(counts)
            found = [file.tokens(counts[places]) for file, places in by_file]
            return Tokens.stacked(found, [places for _, places in by_file])
        genes: IntArray
        if self._is_in_order:
            indptr, genes, values = restrict(counts.indptr, counts.indices, counts.data, self.token_ids)
        else:
            place, token = self._order
            indptr, genes, values = restrict_in_order(counts.indptr, counts.indices, counts.data, place, token)
            if len(token) > self.n_matched:
                indptr, genes, values = sum_repeats(indptr, genes, values)
        # always float32, because quantiles round differently in float32 and float64
        return Tokens(indptr, genes, values.astype(np.float32, copy=False))


def match(
    names: Sequence[str] | pd.Index,
    vocab: Vocab,
    *,
    var: pd.DataFrame | None = None,
    gene_key: str | None = None,
    min_coverage: float = 0.3,
) -> GeneMatch:
    """Find the column of gene names that matches a vocabulary best, and the token of each gene.

    Ensembl version suffixes are stripped in the data and in the vocabulary, and aliases of the vocabulary match too.
    Without ``gene_key``, ``names`` and the usual columns of ``var`` are tried, and the one with most matches is used. A
    column with names of the vocabulary's own kind is preferred to one that matches by aliases. If all of these match
    too few genes, the other columns of text are tried; the best one is used if it matches at least 30 % and twice as
    many genes as ``names``. Spelling is corrected if only one gene can be meant, see
    :func:`scllm.data.spelling.mend`. Raises ``ValueError`` if names are duplicated or coverage is too low.
    """
    if not 0 <= min_coverage <= 1:
        raise ValueError(
            f"Expected min_coverage to be a fraction from 0 to 1, got {min_coverage}. Pass for example 0.3 for 30 %."
        )
    names = pd.Index(names)
    check_unique(names)
    finder = _Finder(vocab, min_coverage)
    candidates = name_columns(names, var, gene_key)
    found = finder.best([finder.matched(column, values) for column, values in candidates.items()])
    if finder.is_enough(found):
        found = finder.mended(found, candidates[found.column])
    else:
        found = finder.best([finder.looked_up(column, values) for column, values in candidates.items()])
    if not finder.is_enough(found):
        others = {**name_columns(names, var), **_other_columns(var)}
        tried = [finder.looked_up(column, values) for column, values in others.items()]
        other = max(tried, key=lambda one: one.n_matched)
        twice = 2 * next(one.n_matched for one in tried if one.column == "var_names")
        if gene_key is not None or other.coverage < max(min_coverage, _TAKEN) or other.n_matched < twice:
            raise ValueError(finder.too_few(found, candidates[found.column], other))
        log.info(
            "using the gene names in var[%r], which match %d genes (%s match %d)",
            other.column,
            other.n_matched,
            found.column,
            found.n_matched,
        )
        found = other
    n_summed = int((found.token_ids >= 0).sum()) - found.n_matched
    if n_summed:
        log.debug("summing %d genes with another gene that has the same token", n_summed)
    if found.mended is not None and found.mended.n:
        log.info("correcting the spelling of %d gene names: %s", found.mended.n, found.mended)
    log.debug(
        "matching %d of %d genes by %s (%.0f %%)", found.n_matched, len(names), found.column, 100 * found.coverage
    )
    return found


def name_columns(names: pd.Index, var: pd.DataFrame | None = None, gene_key: str | None = None) -> dict[str, list[str]]:
    """Collect the columns that may name the genes: ``names`` and the usual columns of ``var``, or only ``gene_key``."""
    if gene_key is not None and gene_key != "var_names":
        if var is None or gene_key not in var:
            raise missing_key(gene_key, [] if var is None else var.columns, "a column of adata.var")
        return {gene_key: var[gene_key].astype(str).tolist()}
    found = {"var_names": names.astype(str).tolist()}
    if gene_key is None and var is not None:
        found |= {column: var[column].astype(str).tolist() for column in USUAL_COLUMNS if column in var}
    return found


def check_unique(names: pd.Index) -> None:
    """Raise ``ValueError`` if a gene name occurs more than once."""
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        raise ValueError(
            f"Expected unique gene names, but {len(repeated)} are duplicated (first: {repeated[0]!r}). "
            "Call adata.var_names_make_unique(), or sum the rows that share a name."
        )


def id_type(names: Iterable[str]) -> Literal["symbol", "ensembl"]:
    """Tell whether names are Ensembl ids (more than half of them look like one) or symbols."""
    names = [str(name) for name in names]
    n_ensembl = sum(ENSEMBL.match(name) is not None for name in names)
    return "ensembl" if 2 * n_ensembl > len(names) else "symbol"


def _other_columns(var: pd.DataFrame | None) -> dict[str, list[str]]:
    """Collect all columns of ``var`` that hold text and are not among the usual ones."""
    if var is None:
        return {}
    unusual = [name for name in var if str(name) not in USUAL_COLUMNS and isinstance(var[name], pd.Series)]
    texts = [name for name in unusual if _holds_text(var[name])]
    return {str(name): var[name].astype(object).where(var[name].notna(), "").astype(str).tolist() for name in texts}


def _holds_text(column: pd.Series) -> bool:
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return pd.api.types.infer_dtype(values, skipna=True) == "string"


class _Finder:
    """Looks up names in one vocabulary."""

    def __init__(self, vocab: Vocab, min_coverage: float) -> None:
        self.vocab, self.min_coverage, self.kind = vocab, min_coverage, id_type(vocab.genes)
        # a vocabulary may hold versioned ids too; the first version of a gene is used
        id_of = {token: i for i, token in reversed(list(enumerate(strip_version(vocab.tokens))))}
        self.id_of = id_of | {alias: id_of[token] for alias, token in vocab.aliases.items() if token in id_of}

    def matched(self, column: str, names: list[str]) -> GeneMatch:
        """Match names as they are spelt."""
        ids = np.fromiter((self.id_of.get(name, -1) for name in strip_version(names)), np.int32)
        return GeneMatch(ids, column, id_type(names), len(self.vocab.genes))

    def mended(self, found: GeneMatch, names: list[str]) -> GeneMatch:
        """Add the tokens of names whose spelling can be corrected."""
        mended = mend(strip_version(names), found.token_ids, self.id_of)
        return GeneMatch(mended.token_ids, found.column, found.id_type, found.n_vocab, mended=mended)

    def looked_up(self, column: str, names: list[str]) -> GeneMatch:
        """Match names as they are spelt, and after correcting their spelling."""
        return self.mended(self.matched(column, names), names)

    def is_enough(self, found: GeneMatch) -> bool:
        """Whether coverage is at least ``min_coverage``."""
        return found.n_matched > 0 and found.coverage >= self.min_coverage

    def best(self, matches: list[GeneMatch]) -> GeneMatch:
        """Choose the column with most matches, preferring the vocabulary's own kind of names to aliases."""
        enough = [one for one in matches if self.is_enough(one)]
        return max(enough or matches, key=lambda one: (bool(enough) and one.id_type == self.kind, one.n_matched))

    def too_few(self, found: GeneMatch, names: list[str], other: GeneMatch) -> str:
        """Write the message for too few matches: the names in the data and in the vocabulary, and what to do."""
        genes, what = self.vocab.genes, {"symbol": "symbols", "ensembl": "Ensembl ids"}
        # coverage is a fraction of the smaller side, so the message counts the genes of that side
        whose, where = ("", "model's vocabulary") if len(names) <= len(genes) else (" of the vocabulary", "data")
        message = (
            f"Only {found.n_matched} of {min(len(names), len(genes))} genes{whose} ({100 * found.coverage:.3g} %) are "
            f"in the {where}; at least {100 * self.min_coverage:.3g} % are needed. The vocabulary holds "
            f"{what[self.kind]} ({genes[0] if genes else ''!r}), {found.column} look like {what[found.id_type]} "
            f"({names[0] if names else ''!r})."
        )
        if other.n_matched > found.n_matched:
            where = other.column if other.column == "var_names" else f"var[{other.column!r}]"
            return f"{message} {where} matches {100 * other.coverage:.3g} %: pass gene_key={other.column!r}."
        if self.kind != found.id_type and all(id_type([alias]) == self.kind for alias in self.vocab.aliases):
            message += f" Pass the column of var that holds {what[self.kind]} with `gene_key=`"
            if self.kind == "symbol":
                return f"{message}."
            return (
                f"{message}. If there is none, put the published dictionary of symbols (gene_name_id_dict.pkl or "
                ".json) into the folder of the Geneformer model, or beside its token dictionary, and load it again."
            )
        return f"{message} {_spelling_advice(found)}"


def _spelling_advice(found: GeneMatch) -> str:
    """Write advice on names that resemble genes of the vocabulary without matching one unambiguously."""
    assert found.mended is not None
    if found.mended.other_case and len(found.mended.other_case) >= found.n_matched:
        name, gene = found.mended.other_case[0]
        return (
            f"{len(found.mended.other_case)} names differ only in case from a gene of the vocabulary ({name!r} and "
            f"{gene!r}). If the data are from another species, replace the names by those of the orthologues; "
            "otherwise rename them (adata.var_names.str.upper() for human)."
        )
    unclear = ""
    if found.mended.unclear:
        name, gene = found.mended.unclear[0]
        unclear = (
            f"{len(found.mended.unclear)} names may stand for several genes, or for one that is already among the "
            f"genes ({name!r} and {gene!r}): rename or sum them. "
        )
    accept = ", or accept it with a lower min_coverage=" if found.n_matched else ""
    return f"{unclear}Check species and gene names{accept}."
