"""Looking up what a verb was asked for, with errors that offer close names."""

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
    "check_adata", "check_options", "embedding", "groups", "holds_numbers", "labels", "missing_key", "obs_column",
    "warn_of_unknown_labels",
]  # fmt: skip


def check_adata(adata: object, copy: bool = False, key_added: str = "result") -> None:
    """Raise where a verb could not write its result: no AnnData, its file in the way, a key that no file can have."""
    if not isinstance(key_added, str) or key_added in ("", ".", ".."):
        error = ValueError if isinstance(key_added, str) else TypeError
        raise error(f"Expected key_added to be a name, got {key_added!r}. Leave it out for the usual one.")
    if not isinstance(adata, AnnData):
        seen = f"{adata!r:.60}" if isinstance(adata, str) else f"of type {type(adata).__name__}"
        raise TypeError(
            f"adata is {seen}, an AnnData expected. Read files with anndata.read_h5ad or anndata.read_zarr."
        )
    if adata.isbacked and (copy or adata.is_view):
        what = "copy=True is given, and adata is backed by a file" if copy else "adata is a view of a backed AnnData"
        raise ValueError(f"{what}, one in memory expected. Pass adata.to_memory().")


def missing_key(key: object, names: Iterable[str], where: str, advice: str = "") -> KeyError:
    """Say that ``key`` is not in ``where`` and offer the closest of ``names``; to be raised by the caller.

    Examples
    --------
    >>> missing_key("celltype", ["cell_type", "batch"], "a column of adata.obs")
    KeyError("'celltype' is not a column of adata.obs. Did you mean 'cell_type'?")
    """
    names = [str(name) for name in names]
    close = get_close_matches(str(key), names, n=3)
    if close:
        offer = f"Did you mean {' or '.join(map(repr, close))}?"
    else:
        offer = f"There is {listed(names)}." if names else "There is none at all."
    return KeyError(" ".join(filter(None, (f"{key!r} is not {where}.", offer, advice))))


def check_options(given: Iterable[str], passed_on: Iterable[str], verb: Callable[..., Any]) -> None:
    """Raise ``TypeError`` where an option is neither the verb's own nor one that it passes on; offer the closest."""
    own = [one.name for one in signature(verb).parameters.values() if one.kind is one.KEYWORD_ONLY]
    known = list(dict.fromkeys([*own, *passed_on]))
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            offer = f"Did you mean {close[0]!r}?" if close else "Leave it out."
            raise TypeError(f"{name!r} is no option of {verb.__name__}, one of {', '.join(known)} expected. {offer}")


def obs_column(obs: pd.DataFrame, key: str, *, owner: str = "adata") -> pd.Series:
    """The column ``key`` as it is; an error if there is none, or no cell. ``owner`` is whose ``obs`` it is."""
    if key not in obs.columns:
        raise missing_key(key, obs.columns, f"a column of {owner}.obs")
    if not len(obs):
        raise ValueError(f"{owner} has 0 cells, at least one expected. Check the filters that came before.")
    column = obs[key]
    if isinstance(column, pd.DataFrame):
        raise ValueError(
            f"{column.shape[1]} columns of {owner}.obs are called {key!r}, one expected. Rename or drop one."
        )
    return column


def holds_numbers(column: pd.Series) -> bool:
    """Whether what is there are numbers, also as Python objects; categories are labels, whatever they are named."""
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
            f"obs[{key!r}] holds numbers ({column.dtype}), labels expected. "
            f"If the numbers are classes: {owner}.obs[{key!r}] = {owner}.obs[{key!r}].astype('category')."
        )
    classes = _as_categories(column)
    if len(classes.cat.categories) < 2:
        raise ValueError(
            f"obs[{key!r}] holds {len(classes.cat.categories)} classes ({listed(classes.cat.categories)}), at least 2 "
            "expected. Pass a column with several labels with `key=`."
        )
    return classes


def warn_of_unknown_labels(obs: pd.DataFrame, key: str, known: Iterable[str], advice: str) -> None:
    """Where cells are labelled already, and with labels that they cannot get again."""
    if key not in obs:
        return
    known, column = list(known), obs[key].dropna().astype(str)
    others = column[~column.isin(known)]
    if len(others):
        warn(
            f"{len(others)} of {len(obs)} cells have labels in obs[{key!r}] that were not learnt (first: "
            f"{others.iloc[0]!r}), {listed(known)} expected. They get one of those; {advice}."
        )


def embedding(adata: AnnData, use_rep: str, *, advice: str = "", owner: str = "adata") -> FloatArray:
    """``obsm[use_rep]`` as a finite dense array, ``(n_cells, d)``."""
    if use_rep not in adata.obsm:
        raise missing_key(use_rep, adata.obsm, f"in {owner}.obsm", advice)
    values = np.asarray(adata.obsm[use_rep])
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.number):
        raise ValueError(
            f"obsm[{use_rep!r}] has shape {values.shape} and type {values.dtype}, numbers of shape (n_cells, d) "
            "expected. Pass the key of a cell embedding with `use_rep=`."
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"obsm[{use_rep!r}] is not finite in {len(bad)} of {len(values)} cells "
            f"(first: {adata.obs_names[bad[0]]!r}), finite values expected. Embed again, or leave those cells out."
        )
    return values


def _as_categories(column: pd.Series) -> pd.Series:
    column = column.astype("category").cat.remove_unused_categories()
    named: dict[str, object] = {}
    for category in column.cat.categories:
        first = named.setdefault(str(category), category)
        if first is not category:
            raise ValueError(
                f"obs[{column.name!r}] holds {first!r} ({type(first).__name__}) and {category!r} "
                f"({type(category).__name__}), labels of different names expected. If they are the same: "
                f"adata.obs[{column.name!r}] = adata.obs[{column.name!r}].astype(object).map(str, na_action='ignore')."
            )
    return column.cat.rename_categories(list(named))
