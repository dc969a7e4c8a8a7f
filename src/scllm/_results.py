"""Write settings and tables into ``adata.uns["scllm"]``, in a form that every AnnData file format can store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from scllm import _keys
from scllm._checks import missing_key
from scllm._log import log
from scllm._typing import IntArray

__all__ = [
    "MatchSettings",
    "classes_of",
    "drop_labels",
    "free_key",
    "match_settings",
    "record",
    "record_classes",
    "record_keys",
    "record_name",
    "recorded",
    "storable_table",
    "thinned_history",
]

# rows of a training history that are written into an AnnData, whose files should stay small
_MAX_ROWS = 2000


class MatchSettings(TypedDict):
    """Column of ``var`` with gene names (``None``: the best), and the least share of genes that must be matched."""

    gene_key: str | None
    min_coverage: float


def record(
    adata: AnnData, verb: str, params: Mapping[str, Any], table: pd.DataFrame | None = None, **results: Any
) -> None:
    """Write ``params`` and ``table`` of a verb into ``adata.uns["scllm"][verb]``, replacing earlier ones.

    Parameters
    ----------
    adata
        The AnnData to write to.
    verb
        Key in ``uns["scllm"]``.
    params
        Settings. ``None`` is omitted, a sequence becomes an array, a path a string, a dataclass a dict of its fields,
        and a mapping two arrays (``keys``, ``values``), because its keys may be class names, which must not become keys
        of a file.
    table
        Long table. Text with missing values becomes categorical, because files cannot store missing text.

    **results
        Further entries, such as the coverage of ``match_genes``.

    Writes
    ------
    ``adata.uns["scllm"][verb]``
        A dict of ``params``, the results and, if given, ``table``.
    """
    entry: dict[str, Any] = {"params": _storable_items(params), **_storable_items(results)}
    if table is not None:
        entry["table"] = storable_table(table)
    # a new outer dict, because the uns of a view shares its inner dicts with the parent AnnData
    adata.uns[_keys.UNS] = {**adata.uns.get(_keys.UNS, {}), verb: entry}


def recorded(adata: AnnData, verb: str, *, made_by: str) -> dict[str, Any]:
    """Return what ``verb`` wrote into ``adata.uns["scllm"]``; the ``KeyError`` otherwise says what to call."""
    written = adata.uns.get(_keys.UNS, {})
    if verb not in written:
        raise missing_key(verb, written, "in adata.uns['scllm']", f"Call {made_by} first.")
    return written[verb]


def free_key(adata: AnnData, slot: str, name: str) -> str:
    """The key for results called ``name``, such as ``"T_NK"`` for ``"T/NK"``; an error where it is that of others.

    Parameters
    ----------
    adata
        Where results are to be written.
    slot
        ``"obs"``, ``"obsm"``, ``"layers"``, ...
    name
        What the caller asked for, or what follows from it.
    """
    key = _keys.safe(name)
    keys = _key_table(adata)
    owners = keys.loc[(keys["slot"] == slot) & (keys["key"] == key), "name"].astype(str).tolist()
    if key in getattr(adata, slot) and (owners or [key])[0] != name:
        holds = f"the results of {owners[0]!r}" if owners else "other values"
        raise ValueError(
            f"Expected {slot}[{key!r}] to be free for the results of {name!r}, because '/' becomes '_' in keys, but it "
            f"holds {holds}. Pass another key_added, or rename one of them."
        )
    if key != name:
        log.info("writing %r as %r: files do not take '/' in a key", name, key)
    return key


def record_keys(adata: AnnData, slot: str, names: Sequence[str], *, call: str) -> list[str]:
    """Write down which keys a call writes for which names; return those that it wrote before and does not any more.

    ``call`` is the ``key_added`` of the call.
    """
    keys = _key_table(adata)
    is_ours = (keys["slot"] == slot) & (keys["call"] == call)
    earlier = keys.loc[is_ours, "key"].astype(str).tolist()
    new = pd.DataFrame({"call": call, "slot": slot, "name": list(names), "key": list(map(_keys.safe, names))})
    record(adata, "keys", {}, pd.concat([keys[~is_ours], new], ignore_index=True).astype(str))
    return [key for key in earlier if key not in set(new["key"])]


def record_name(adata: AnnData, slot: str, name: str) -> None:
    """Write down for which name a verb writes its one key, if it is not the name itself."""
    if _keys.safe(name) != name:
        record_keys(adata, slot, [name], call=name)


def _key_table(adata: AnnData) -> pd.DataFrame:
    entry = adata.uns.get(_keys.UNS, {}).get("keys", {})
    return entry.get("table", pd.DataFrame(columns=["call", "slot", "name", "key"], dtype=object))


def drop_labels(adata: AnnData, column: str) -> None:
    """Remove a column of labels or values of an earlier call, with its scores and the names of its classes."""
    columns = [column, column + _keys.PROBABILITY, column + _keys.DISTANCE]
    adata.obs = adata.obs.drop(columns=columns, errors="ignore")
    adata.obsm.pop(column + _keys.PROBABILITIES, None)
    names = _class_names(adata)
    if (names["column"] == column).any():
        record(adata, "probabilities", {}, names[names["column"] != column].reset_index(drop=True))


def record_classes(adata: AnnData, column: str, classes: Iterable[str]) -> None:
    """Record the classes of ``obsm[column + "_probabilities"]``, keeping those of other columns."""
    earlier = _class_names(adata)
    new = pd.DataFrame({"column": column, "class": list(classes)})
    table = pd.concat([earlier[earlier["column"] != column], new], ignore_index=True)
    record(adata, "probabilities", {}, table)


def classes_of(adata: AnnData, column: str) -> list[str]:
    """Return the classes that :func:`record_classes` recorded for a column, in order; empty if there are none."""
    table = _class_names(adata)
    return table.loc[table["column"] == column, "class"].astype(str).tolist()


def _class_names(adata: AnnData) -> pd.DataFrame:
    entry = adata.uns.get(_keys.UNS, {}).get("probabilities", {})
    return entry.get("table", pd.DataFrame(columns=["column", "class"], dtype=object))


def match_settings(data: object, gene_key: str | None = None, min_coverage: float | None = None) -> MatchSettings:
    """How the genes of the data are matched: as asked for, else as by an earlier ``pp.match_genes`` on this AnnData."""
    if min_coverage is not None and not 0 <= min_coverage <= 1:
        raise ValueError(f"Expected min_coverage from 0 to 1, got {min_coverage}. Leave it out for 0.3.")
    found = data.uns.get(_keys.UNS, {}).get("match_genes", {}) if isinstance(data, AnnData) else {}
    params = found.get("params", {})
    key = params.get("gene_key") if gene_key is None else gene_key
    least = params.get("min_coverage", 0.3) if min_coverage is None else min_coverage
    return {"gene_key": None if key is None else str(key), "min_coverage": float(least)}


def thinned_history(history: pd.DataFrame, n_rows: int = _MAX_ROWS) -> pd.DataFrame:
    """Return at most ``n_rows`` rows of a training history: all of validation, and evenly spread rows of training.

    If there are more than ``n_rows`` rows of validation, both splits are thinned, each to half. The best row of
    validation stays.
    """
    if len(history) <= n_rows:
        return history
    is_validation = (history["split"] == "validation").to_numpy()
    validation, training = is_validation.nonzero()[0], (~is_validation).nonzero()[0]
    if len(validation) > n_rows:
        best = validation[np.argmin(history["loss"].to_numpy(float)[validation])]
        validation = np.union1d(_spread(validation, n_rows // 2 - 1), [best])
    kept = np.union1d(validation, _spread(training, n_rows - len(validation)))
    return history.iloc[kept].reset_index(drop=True)


def _spread(rows: IntArray, n: int) -> IntArray:
    """Return at most ``n`` of ``rows``, evenly spread from the first to the last."""
    return rows if len(rows) <= n else rows[np.linspace(0, len(rows) - 1, n).round().astype(int)]


def storable_table(table: pd.DataFrame) -> pd.DataFrame:
    """A copy that every AnnData file format takes: what is no number becomes text, text with gaps categorical."""
    columns = {_keys.safe(str(name)): _storable_column(column) for name, column in table.items()}
    is_counted = isinstance(table.index, pd.RangeIndex)
    # an index may have the name of a column, which no file format takes
    name = None if table.index.name is None or str(table.index.name) in columns else str(table.index.name)
    index = table.index if is_counted else pd.Index(table.index.map(str).to_list(), dtype=object, name=name)
    return pd.DataFrame(columns, index=index)


def _storable_column(column: pd.Series) -> pd.Series | NDArray[Any]:
    """Plain numpy values, nullable integers and booleans, or categories of numbers or text; without an index."""
    if isinstance(column.dtype, pd.SparseDtype):
        column = pd.Series(np.asarray(column))
    if isinstance(column.dtype, pd.ArrowDtype):
        column = column.convert_dtypes(dtype_backend="numpy_nullable")
    if isinstance(column.dtype, pd.CategoricalDtype):
        return _storable_categories(column)
    if isinstance(column.dtype, (pd.Float32Dtype, pd.Float64Dtype)):
        return column.to_numpy(np.float64, na_value=np.nan)
    if pd.api.types.is_numeric_dtype(column.dtype) and column.dtype.kind != "c":
        return column.array
    is_known = column.notna()
    if not is_known.any():
        return np.full(len(column), np.nan)
    text = column.astype(object).map(str, na_action="ignore")
    return text.to_numpy() if is_known.all() else text.astype("category").array


def _storable_categories(column: pd.Series) -> pd.Categorical:
    categories = column.cat.categories
    if isinstance(categories.dtype, np.dtype) and categories.dtype.kind in "iufb":
        return column.array
    if pd.api.types.is_numeric_dtype(categories.dtype):
        return column.cat.rename_categories(np.asarray(categories)).array
    names = categories.map(str).astype(object)
    if not names.is_unique:  # 1 and "1" are one
        return column.astype(object).map(str, na_action="ignore").astype("category").array
    return column.cat.rename_categories(names).array


def _storable_items(items: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _storable(value) for name, value in items.items() if value is not None}


def _storable(value: Any) -> Any:
    match value:
        case str() | bool() | int() | float() | np.generic() | np.ndarray():
            return value
        case pd.DataFrame():
            return storable_table(value)
        case Path():
            return str(value)
        case Mapping():
            return {"keys": _array(value), "values": _array(value.values())}
        case AbstractSet():
            return _array(sorted(value, key=str))
        case list() | tuple() | range() | pd.Series() | pd.Index():
            return _array(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _storable_items({field.name: getattr(value, field.name) for field in fields(value)})
    return str(value)


def _array(values: Any) -> NDArray[Any]:
    """Return an array of numbers, or of strings if a value is not a number (a tuple of genes becomes ``"A,B"``)."""
    values = list(values)
    if all(isinstance(value, (bool, int, float, np.number, np.bool_)) for value in values):
        return np.array(values)
    return np.array([_text(value) for value in values], dtype=object)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple, set, frozenset)) else str(value)
