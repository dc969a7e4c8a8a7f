"""Which names a data set uses for its genes, and which token each of them is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd

from scllm._checks import missing_key
from scllm._log import log
from scllm._typing import CSR, IntArray
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.kernels.ragged import restrict, restrict_in_order, sum_repeats

__all__ = ["USUAL_COLUMNS", "GeneMatch", "check_unique", "id_type", "match", "name_columns", "strip_version"]

_ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{11}(\.\d+)?$", re.IGNORECASE)

# columns in which AnnData files of the usual sources (scanpy, CELLxGENE, 10x, Seurat exports) keep the other names
USUAL_COLUMNS = (
    "feature_name", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol", "gene_short_name",
    "ensembl_id", "feature_id", "gene_ids", "gene_id", "ensembl", "ensembl_ids",
)  # fmt: skip


@dataclass(frozen=True)
class GeneMatch:
    """How the genes of a data set map into a vocabulary.

    Parameters
    ----------
    token_ids
        Token of each gene of the data, ``(n_genes,)`` int32, -1 where the vocabulary does not have it.
    column
        Where the names were found: ``"var_names"`` or a column of ``var``.
    id_type
        What the names are: ``"symbol"`` or ``"ensembl"``.
    n_vocab
        Genes in the vocabulary.
    files
        Where files with different genes are read together: how the genes of each file match, over the same columns;
        a gene that a file did not measure is -1 there.
    file_of
        Which of ``files`` each cell of the source is from.
    """

    token_ids: IntArray
    column: str
    id_type: Literal["symbol", "ensembl"]
    n_vocab: int
    files: tuple[GeneMatch, ...] = ()
    file_of: IntArray | None = field(default=None, repr=False)

    @cached_property
    def n_matched(self) -> int:
        """Distinct genes of the vocabulary that the data have."""
        return len(np.unique(self.token_ids[self.token_ids >= 0]))

    @property
    def coverage(self) -> float:
        """Matched genes as a share of the smaller of (genes in the data, genes in the vocabulary)."""
        return self.n_matched / max(1, min(len(self.token_ids), self.n_vocab))

    @cached_property
    def measured(self) -> IntArray:
        """Tokens of the genes that the data (any of the files) have, each once, in rising order."""
        if self.files:
            return np.unique(np.concatenate([file.measured for file in self.files]))
        return np.unique(self.token_ids[self.token_ids >= 0])

    def by_file(self, rows: IntArray) -> list[tuple[GeneMatch, IntArray]]:
        """How the genes of some cells of the source match, file by file, and the places of its cells in ``rows``."""
        if self.file_of is None:
            return [(self, np.arange(len(rows)))]
        file = self.file_of[rows]
        return [(self.files[i], np.flatnonzero(file == i)) for i in np.unique(file)]

    @cached_property
    def _order(self) -> tuple[IntArray, IntArray]:
        """Place of each column among the known ones in the order of their tokens, -1 for others; tokens by place."""
        known = np.flatnonzero(self.token_ids >= 0)
        known = known[np.argsort(self.token_ids[known], kind="stable")]
        place = np.full(len(self.token_ids), -1, np.int32)
        place[known] = np.arange(len(known))
        return place, self.token_ids[known].astype(np.int32)

    @cached_property
    def _is_in_order(self) -> bool:
        """Whether the known columns stand in the order of their tokens, no token twice."""
        return bool((np.diff(self.token_ids[self.token_ids >= 0]) > 0).all())

    def tokens(self, counts: CSR, rows: IntArray | None = None) -> Tokens:
        """Counts as ragged rows over the vocabulary, each row in the order of its token ids.

        Zeros and genes that are not in the vocabulary are dropped. Counts of columns that share a token are summed, in
        float64 and from the lowest to the highest. So a cell's tokens depend on its genes and their counts, and not on
        the order of the columns, and whatever breaks a tie later by position breaks it by token id.

        Parameters
        ----------
        counts
            CSR, its columns sorted and free of duplicates, as sources read it.
        rows
            Which cells of the source these are; needed where its files hold different genes.
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
        if self._is_in_order:
            indptr, genes, values = restrict(counts.indptr, counts.indices, counts.data, self.token_ids)
        else:
            place, token = self._order
            indptr, genes, values = restrict_in_order(counts.indptr, counts.indices, counts.data, place, token)
            if len(token) > self.n_matched:
                indptr, genes, values = sum_repeats(indptr, genes, values)
        # one type whatever the file's: quantiles round differently in float32 and float64
        return Tokens(indptr, genes, values.astype(np.float32, copy=False))


def match(
    names: Sequence[str] | pd.Index,
    vocab: Vocab,
    *,
    var: pd.DataFrame | None = None,
    gene_key: str | None = None,
    min_coverage: float = 0.3,
) -> GeneMatch:
    """Find the column of gene names that fits a vocabulary best, and the token of each gene.

    Ensembl version suffixes are stripped, on both sides, and the vocabulary's aliases count as its names. Without
    ``gene_key``, ``names`` and the usual columns of ``var`` are tried and the one with most matches is taken; one with
    names of the vocabulary's own kind goes before one that is known by aliases. Raises ``ValueError`` where names are
    duplicated or coverage is too low.
    """
    names = pd.Index(names)
    check_unique(names)
    candidates = name_columns(names, var, gene_key)
    # a vocabulary may hold versions too; of several of one gene the first is taken
    id_of = {token: i for i, token in reversed(list(enumerate(strip_version(vocab.tokens))))}
    id_of |= {alias: id_of[token] for alias, token in vocab.aliases.items() if token in id_of}
    known = {
        column: np.fromiter((id_of.get(name, -1) for name in strip_version(values)), np.int32)
        for column, values in candidates.items()
    }
    kind = id_type(vocab.genes)
    matches = [GeneMatch(ids, column, id_type(candidates[column]), len(vocab.genes)) for column, ids in known.items()]
    enough = [one for one in matches if one.n_matched and one.coverage >= min_coverage]
    # an Ensembl id says more surely which gene it is than a symbol that a dictionary knows
    found = max(enough or matches, key=lambda one: (bool(enough) and one.id_type == kind, one.n_matched))
    if not enough:
        raise ValueError(_too_few(found, candidates[found.column], vocab, min_coverage))
    n_summed = int((found.token_ids >= 0).sum()) - found.n_matched
    if n_summed:
        log.debug("%d genes share a token with another gene and are summed with it", n_summed)
    log.debug("%d of %d genes matched by %s (%.0f %%)", found.n_matched, len(names), found.column, 100 * found.coverage)
    return found


def name_columns(names: pd.Index, var: pd.DataFrame | None = None, gene_key: str | None = None) -> dict[str, list[str]]:
    """Where the names of genes may stand: ``names`` themselves and the usual columns of ``var``, or ``gene_key``."""
    if gene_key is not None and gene_key != "var_names":
        if var is None or gene_key not in var:
            raise missing_key(gene_key, [] if var is None else var.columns, "a column of adata.var")
        return {gene_key: var[gene_key].astype(str).tolist()}
    found = {"var_names": names.astype(str).tolist()}
    if gene_key is None and var is not None:
        found |= {column: var[column].astype(str).tolist() for column in USUAL_COLUMNS if column in var}
    return found


def check_unique(names: pd.Index) -> None:
    """Raise ``ValueError`` where a gene name is there more than once."""
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        raise ValueError(
            f"{len(repeated)} gene names are duplicated (first: {repeated[0]!r}), every gene must be there once. "
            "Call adata.var_names_make_unique(), or sum the rows that share a name."
        )


def strip_version(names: Iterable[str]) -> list[str]:
    """Names as strings, Ensembl ids in capitals and without version (``ENSG00000141510.17``: ``ENSG00000141510``)."""
    names = [str(name) for name in names]
    return [name.split(".")[0].upper() if _ENSEMBL.match(name) else name for name in names]


def id_type(names: Iterable[str]) -> Literal["symbol", "ensembl"]:
    """Whether names are Ensembl ids (more than half look like one) or symbols."""
    names = [str(name) for name in names]
    n_ensembl = sum(_ENSEMBL.match(name) is not None for name in names)
    return "ensembl" if 2 * n_ensembl > len(names) else "symbol"


def _too_few(found: GeneMatch, names: list[str], vocab: Vocab, min_coverage: float) -> str:
    what = {"symbol": "symbols", "ensembl": "Ensembl ids"}
    theirs = id_type(vocab.genes)
    message = (
        f"{found.n_matched} of {min(len(names), len(vocab.genes))} genes are in the model's vocabulary "
        f"({100 * found.coverage:.3g} %), at least {100 * min_coverage:.3g} % expected. The vocabulary holds "
        f"{what[theirs]} ({vocab.genes[0] if vocab.genes else ''!r}), {found.column} look like "
        f"{what[found.id_type]} ({names[0] if names else ''!r})."
    )
    if theirs != found.id_type and all(id_type([alias]) == theirs for alias in vocab.aliases):
        message += f" Pass the column of adata.var that holds {what[theirs]} with `gene_key=` in pp.match_genes"
        if theirs == "symbol":
            return f"{message}."
        return (
            f"{message}; if there is none, lay the published dictionary of symbols (gene_name_id_dict.pkl or .json) "
            "into the folder of the Geneformer model, or beside its token dictionary, and load it anew."
        )
    upper = {gene.upper() for gene in vocab.genes}
    n_alike = sum(name.upper() in upper for name in set(names))
    if n_alike > max(2 * found.n_matched, min_coverage * len(names)):
        return (
            f"{message} {n_alike} are there in other letters, small or capital: rename them if they are of the same "
            "species (adata.var_names.str.upper() for human), and find orthologues if not."
        )
    advice = f"{message} Check species and gene names"
    return (
        f"{advice}, or accept it with pp.match_genes(adata, model, min_coverage=...)."
        if found.n_matched
        else f"{advice}."
    )
