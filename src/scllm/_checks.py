"""Check arguments and look up columns and embeddings, with errors that suggest close names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from inspect import signature
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm._log import warn
from scllm._names import listed
from scllm._typing import FloatArray

__all__ = [
    "check_adata",
    "check_options",
    "embedding",
    "groups",
    "holds_numbers",
    "labels",
    "missing_key",
    "obs_column",
    "warn_of_unknown_labels",
]


def check_adata(adata: object, copy: bool = False, key_added: str = "result") -> None:
    """Raise if a verb could not write its result: not an AnnData, backed by a file, or a key that no file can have."""
    if not isinstance(key_added, str) or key_added in ("", ".", ".."):
        error = ValueError if isinstance(key_added, str) else TypeError
        raise error(f"Expected key_added to be a name, got {key_added!r}. Leave it out for the default name.")
    if not isinstance(adata, AnnData):
        seen = f"{adata!r:.60}" if isinstance(adata, str) else f"of type {type(adata).__name__}"
        raise TypeError(
            f"Expected adata to be an AnnData, got {seen}. Read files with anndata.read_h5ad or anndata.read_zarr."
        )
    if adata.isbacked and (copy or adata.is_view):
        what = "one backed by a file with copy=True" if copy else "a view of a backed AnnData"
        raise ValueError(f"Expected adata to be an AnnData in memory, got {what}. Pass adata.to_memory().")


def missing_key(key: object, names: Iterable[str], where: str, advice: str = "") -> KeyError:
    """Make a ``KeyError`` that says that ``key`` is not ``where`` and suggests the closest of ``names``.

    Examples
    --------
    >>> missing_key("celltype", ["cell_type", "batch"], "a column of adata.obs")
    KeyError("'celltype' is not a column of adata.obs. Did you mean 'cell_type'?")
    """
    names = [str(name) for name in names]
    by_small = {name.casefold(): name for name in reversed(names)}
    close = get_close_matches(str(key), names, n=3) or [
        by_small[name] for name in get_close_matches(str(key).casefold(), by_small, n=3)
    ]
    if close:
        offer = f"Did you mean {' or '.join(map(repr, close))}?"
    else:
        offer = f"There is {listed(names)}." if names else "There is none at all."
    return KeyError(" ".join(filter(None, (f"{key!r} is not {where}.", offer, advice))))


def check_options(given: Iterable[str], passed_on: Iterable[str], verb: Callable[..., Any]) -> None:
    """Raise ``TypeError`` if an option is neither the verb's own nor one that it passes on; suggest the closest."""
    own = [one.name for one in signature(verb).parameters.values() if one.kind is one.KEYWORD_ONLY]
    known = list(dict.fromkeys([*own, *passed_on]))
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            offer = f"Did you mean {close[0]!r}?" if close else "Leave it out."
            raise TypeError(f"{verb.__name__} has no option {name!r}. Expected one of {', '.join(known)}. {offer}")


def obs_column(obs: pd.DataFrame, key: str, *, owner: str = "adata") -> pd.Series:
    """Return the column ``key`` of the ``obs`` of ``owner``; raise if there is no such column, or no cell."""
    if key not in obs.columns:
        raise missing_key(key, obs.columns, f"a column of {owner}.obs")
    if not len(obs):
        raise ValueError(f"Expected at least one cell in {owner}, got 0 cells. Check earlier filters.")
    column = obs[key]
    if isinstance(column, pd.DataFrame):
        raise ValueError(
            f"Expected one column {key!r} in {owner}.obs, got {column.shape[1]}. Rename or drop the others."
        )
    return column


def holds_numbers(column: pd.Series) -> bool:
    """Return whether a column holds numbers, also as Python objects; categories are labels, whatever their type."""
    numbers = ("integer", "floating", "mixed-integer-float", "decimal", "complex")
    return pd.api.types.infer_dtype(column, skipna=True) in numbers


def groups(obs: pd.DataFrame, key: str) -> pd.Series:
    """``obs[key]``, whatever its type, as the categories that occur: named as strings, missing where it is missing."""
    return _as_categories(obs_column(obs, key))


def labels(obs: pd.DataFrame, key: str, *, owner: str = "adata") -> pd.Series:
    """``obs[key]`` as the classes that occur, named as strings and missing where the label is missing.

    Numbers and fewer than two classes are a ``ValueError``: they cannot be told apart from values, or learned.
    """
    column = obs_column(obs, key, owner=owner)
    if holds_numbers(column):
        raise ValueError(
            f"Expected labels in obs[{key!r}], got numbers ({column.dtype}). "
            f"If the numbers are classes, run {owner}.obs[{key!r}] = {owner}.obs[{key!r}].astype('category')."
        )
    classes = _as_categories(column)
    if len(classes.cat.categories) < 2:
        raise ValueError(
            f"Expected at least 2 classes in obs[{key!r}], got {len(classes.cat.categories)} "
            f"({listed(classes.cat.categories)}). Pass a column with several labels as key=."
        )
    return classes


def warn_of_unknown_labels(obs: pd.DataFrame, key: str, known: Iterable[str], advice: str) -> None:
    """Warn if cells already have labels that the model cannot predict."""
    if key not in obs:
        return
    known, column = list(known), obs[key].dropna().astype(str)
    others = column[~column.isin(known)]
    if len(others):
        warn(
            f"{len(others)} of {len(obs)} cells have a label in obs[{key!r}] that cannot be predicted (first: "
            f"{others.iloc[0]!r}). They will get one of {listed(known)}; {advice}."
        )


def embedding(adata: AnnData, use_rep: str, *, advice: str = "", owner: str = "adata") -> FloatArray:
    """Return ``obsm[use_rep]`` as a finite dense array, ``(n_cells, d)``."""
    if use_rep not in adata.obsm:
        raise missing_key(use_rep, adata.obsm, f"in {owner}.obsm", advice)
    values = np.asarray(adata.obsm[use_rep])
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number):
        raise ValueError(
            f"Expected numbers of shape (n_cells, d) in obsm[{use_rep!r}], got shape {values.shape} and type "
            f"{values.dtype}. Pass the key of a cell embedding as use_rep=."
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"Expected finite values in obsm[{use_rep!r}], but {len(bad)} of {len(values)} cells have others (first: "
            f"{adata.obs_names[bad[0]]!r}). Embed again, or remove those cells."
        )
    return values


def _as_categories(column: pd.Series) -> pd.Series:
    column = column.astype("category").cat.remove_unused_categories()
    named: dict[str, object] = {}
    for category in column.cat.categories:
        first = named.setdefault(str(category), category)
        if first is not category:
            raise ValueError(
                f"Expected labels in obs[{column.name!r}] that differ as text, got {first!r} ({type(first).__name__}) "
                f"and {category!r} ({type(category).__name__}). If they are the same label, run "
                f"adata.obs[{column.name!r}] = adata.obs[{column.name!r}].astype(object).map(str, na_action='ignore')."
            )
    return column.cat.rename_categories(list(named))
