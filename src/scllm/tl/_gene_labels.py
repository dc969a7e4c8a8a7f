"""Read labels of genes in any accepted form and match them to the genes that data and model share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from scllm._checks import holds_numbers, missing_key
from scllm._labels import Categories
from scllm._log import warn
from scllm._typing import IntArray
from scllm.data import genes

__all__ = ["GeneLabels", "LabelLike", "check_enough", "read_labels"]

LabelLike = str | pd.Series | pd.DataFrame | Mapping[str, Any]


@dataclass(frozen=True)
class GeneLabels:
    """Labelled genes in the model's vocabulary, sorted by name.

    Parameters
    ----------
    classes
        The distinct labels.
    names
        Name of each gene, ``(g,)``.
    tokens, codes
        Token of each gene, and index of its label in ``classes``, ``(g,)``.
    of_row
        Index of the gene for each row of ``var``, -1 for rows without a label, ``(n_vars,)``.
    categories
        How the labels were stored in their source.
    """

    classes: tuple[str, ...]
    names: NDArray[np.object_]
    tokens: IntArray
    codes: IntArray
    of_row: IntArray
    categories: Categories

    def take(self, chosen: NDArray[np.bool_]) -> GeneLabels:
        """Select some of the genes; all classes are kept."""
        place = np.where(chosen, np.cumsum(chosen) - 1, -1)
        of_row = np.where(self.of_row >= 0, place[self.of_row], -1)
        return replace(
            self, names=self.names[chosen], tokens=self.tokens[chosen], codes=self.codes[chosen], of_row=of_row
        )


def read_labels(adata: AnnData, labels: LabelLike, tokens: IntArray) -> GeneLabels:
    """Find the labelled rows of ``var`` that have a token, and combine rows of the same gene."""
    column, categories = _by_row(adata, labels)
    classes = pd.Index(sorted(column.dropna().unique()))
    codes = classes.get_indexer(column)
    rows = np.flatnonzero((codes >= 0) & (tokens >= 0))
    if not len(rows):
        first = column.dropna().index[0]
        raise ValueError(
            "Expected labelled genes to be in the model's vocabulary, got none of the "
            f"{int((codes >= 0).sum())} labelled genes of the data (first: {first!r}). Check the names with "
            "pp.match_genes(adata, model), or label other genes."
        )
    # sorted by name, so that folds depend neither on the order of labels nor on that of var
    rows = rows[np.argsort(column.index.to_numpy().astype(str)[rows], kind="stable")]
    _, first, place = np.unique(tokens[rows], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    of_row = np.full(adata.n_vars, -1)
    of_row[rows] = rank[place]
    first = rows[np.sort(first)]
    conflicting = rows[codes[first][of_row[rows]] != codes[rows]]
    if len(conflicting):
        one, other = first[of_row[conflicting[0]]], conflicting[0]
        raise ValueError(
            f"Expected one label per gene, got {column.iloc[one]!r} for {column.index[one]!r} and "
            f"{column.iloc[other]!r} for {column.index[other]!r}, which are the same gene in the model's vocabulary. "
            "Drop one of the labels."
        )
    return GeneLabels(
        tuple(classes), column.index.to_numpy(object)[first], tokens[first], codes[first], of_row, categories
    )


def check_enough(found: GeneLabels, n_folds: int) -> None:
    """Raise unless every label has at least one gene in every fold."""
    counts = np.bincount(found.codes, minlength=len(found.classes))
    present = np.flatnonzero(counts)
    if len(present) < 2:
        raise ValueError(
            f"Expected at least 2 classes among the labelled genes that data and model share, got {len(present)} "
            f"({', '.join(repr(found.classes[i]) for i in present)}). Label genes of another class too."
        )
    few = np.flatnonzero(counts < n_folds)
    if len(few):
        raise ValueError(
            f"Expected at least n_folds={n_folds} genes of each class, one for each fold, got {counts[few[0]]} of "
            f"class {found.classes[few[0]]!r} that are in the data, in the model's vocabulary and in at least one "
            "cell. Pass fewer folds, merge or drop the class, or use data with more genes."
        )


def _by_row(adata: AnnData, labels: LabelLike) -> tuple[pd.Series, Categories]:
    """Return the label of each row of ``var`` as a string or NaN, and how the labels were stored."""
    genes.check_unique(adata.var_names)
    match labels:
        case str():
            if labels not in adata.var:
                raise missing_key(labels, adata.var.columns, "a column of adata.var")
            return _as_labels(adata.var[labels], f"var[{labels!r}]"), Categories.of(adata.var[labels])
        case pd.DataFrame():
            given, candidates = _label_column(labels)
        case pd.Series():
            given, candidates = labels, [labels.index]
        case Mapping():
            for gene, label in labels.items():
                if isinstance(label, Collection) and not isinstance(label, str):
                    raise TypeError(
                        f"Expected labels to map each gene to one label, got a {type(label).__name__} for {gene!r}. "
                        "Invert the mapping: {gene: label for label, genes in labels.items() for gene in genes}."
                    )
            given = pd.Series(dict(labels), dtype=object)
            candidates = [given.index]
        case _:
            raise TypeError(
                "Expected labels to be a Series or mapping from gene to label, a column of adata.var or a table as "
                f"returned by datasets.gene_set, got a {type(labels).__name__}. Pass one of those."
            )
    categories = Categories.of(given)
    given = _as_labels(given, "labels")
    missing = given.isna().to_numpy()
    if missing.any():
        warn(
            f"{missing.sum()} of {len(given)} genes have no label (first: {candidates[0][missing.argmax()]!r}) and are "
            "ignored. Drop them from labels to silence this warning."
        )
    values = given.to_numpy(object)[~missing]
    found = [_found(adata, names[~missing]) for names in candidates]
    names, place = max(found, key=lambda pair: len(np.unique(pair[1])))
    if (place < 0).all():
        raise ValueError(
            f"Expected labels of genes in the data, got {len(values)} labelled genes, none of which is in the data "
            f"(first: {names[0]!r}; adata.var_names begin with {adata.var_names[0]!r}). Names must have the same upper "
            "and lower case. If they are of another kind, add that kind as a column of adata.var, 'gene_symbol' or "
            "'ensembl_id'."
        )
    _check_once(names, values, strict=not isinstance(labels, pd.DataFrame))
    return pd.Series(np.where(place >= 0, values[place], np.nan), index=adata.var_names, dtype=object), categories


def _as_labels(column: pd.Series, what: str) -> pd.Series:
    """Convert labels to strings; raise if they are numbers."""
    known = column.dropna()
    if holds_numbers(known):
        raise ValueError(
            f"Expected {what} to hold labels, got numbers (first: {known.iloc[0]}). If they are classes, convert them "
            "to strings, '1' instead of 1 (call .astype(str) on the values that are not missing)."
        )
    if not len(known):
        raise ValueError(f"Expected {what} to hold at least 2 classes, got no label. Pass the labels of some genes.")
    return column.astype(object).map(str, na_action="ignore")


def _label_column(table: pd.DataFrame) -> tuple[pd.Series, list[pd.Index]]:
    """Return the only column that does not name genes, and the index and columns that may name them."""
    is_name = [str(name) in genes.USUAL_COLUMNS for name in table.columns]
    others = [name for name, named in zip(table.columns, is_name, strict=True) if not named]
    if len(others) != 1:
        raise ValueError(
            f"Expected the table of labels to have one column besides gene names, got {len(others)} "
            f"({', '.join(map(repr, others[:5]))}). Pass the column of labels: labels=table['...']."
        )
    names = [pd.Index(table[name]) for name, named in zip(table.columns, is_name, strict=True) if named]
    return table[others[0]], [table.index, *names]


def _found(adata: AnnData, names: pd.Index) -> tuple[pd.Index, IntArray]:
    """Return the names without versions, and the index of the name for each row of ``var`` (-1: none).

    Names are compared with the column of ``var`` that contains most of them.
    """
    plain = pd.Index(genes.strip_version(names))
    place_of = {name: i for i, name in reversed(list(enumerate(plain)))}
    columns = genes.name_columns(adata.var_names, adata.var).values()
    places = [np.array([place_of.get(name, -1) for name in genes.strip_version(values)]) for values in columns]
    return plain, max(places, key=lambda place: len(np.unique(place)))


def _check_once(names: pd.Index, values: NDArray[np.object_], *, strict: bool) -> None:
    """Raise if a gene is labelled twice, except with the same label in a table, where two ids may share a symbol."""
    pairs = pd.DataFrame({"name": names, "label": values})
    twice = pairs if strict else pairs.drop_duplicates()
    twice = twice[twice["name"].duplicated(keep=False)]
    if len(twice):
        name = twice["name"].iloc[0]
        seen = ", ".join(map(repr, twice.loc[twice["name"] == name, "label"]))
        raise ValueError(
            f"Expected one label per gene, got several for {twice['name'].nunique()} of the genes (first: {name!r}: "
            f"{seen}). Drop the repeats: labels[~labels.index.duplicated()]."
        )
