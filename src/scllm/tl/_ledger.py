"""The training ledger: data sets and donors that a model was trained on, and cells to evaluate that come from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem

from scllm import _keys
from scllm._log import warn
from scllm._typing import IntArray
from scllm.data.anndata_file import AnnDataFile
from scllm.data.cells import CellSource

__all__ = ["record_training", "seen_groups", "warn_of_seen"]

# columns of obs that name the data set and the donor of a cell, the Census' first
_DATASET = ("dataset_id", "dataset", "study")
_DONOR = ("donor_id", "donor")


def record_training(
    ledger: pd.DataFrame | None, verb: str, data: object, source: CellSource, rows: IntArray
) -> pd.DataFrame | None:
    """Return the ledger of a model with the data sets and donors that it is now trained on.

    Parameters
    ----------
    ledger
        What the model was trained on before.
    verb
        The verb that trains.
    data, source
        The data as they were passed, and as they are read.
    rows
        The training cells.

    Returns
    -------
    One row for each verb, data set and donor: ``verb``, ``dataset``, ``donor``, ``n_cells``, and the ``obs_filter`` and
    ``census_version`` with which :func:`scllm.datasets.census` drew the cells. Unknown entries are empty. ``None`` if
    neither data sets nor donors were ever known.
    """
    columns = [_first(names, source.obs_columns) for names in (_DATASET, _DONOR)]
    known = [column for column in columns if column is not None]
    if not known:
        return ledger
    found = _origins(source.obs(known).iloc[rows])
    draws = list(_draws(data, source))
    for name in ("obs_filter", "census_version"):
        found[name] = "; ".join(dict.fromkeys(str(draw[name]) for draw in draws if name in draw))
    found.insert(0, "verb", verb)
    return found if ledger is None else pd.concat([ledger, found], ignore_index=True)


def warn_of_seen(ledger: pd.DataFrame | None, obs: pd.DataFrame, *, what: str = "the model") -> None:
    """Warn if cells come from donors that a model was trained on, or from other donors of its data sets."""
    if ledger is None or not len(ledger) or not any(_first(names, obs.columns) for names in (_DATASET, _DONOR)):
        return
    of_donors, of_datasets = _seen(ledger, obs)
    what_was_seen = (
        (of_donors, "donor", f"donors that {what} was trained on"),
        (of_datasets, "dataset", f"other donors of data sets that {what} was trained on"),
    )
    parts = [
        f"{sum(one.n_cells for one in origins)} of {len(obs)} cells come from {which} (first: "
        f"{getattr(origins[0], name)!r})"
        for origins, name, which in what_was_seen
        if origins
    ]
    if parts:
        warn(
            f"{', and '.join(parts)}. Their scores may be higher than those of new donors. Evaluate on cells of other "
            "donors and data sets; model.report lists those of the training."
        )


def seen_groups(ledger: pd.DataFrame, obs: pd.DataFrame, group: pd.Series) -> set[str]:
    """Return the groups of cells that a model may have been trained on.

    These are the groups with cells of its donors, those with cells of its data sets where a donor is not known, and
    those with the name of one of its donors or data sets.
    """
    names = set(ledger["donor"].astype(str)) | set(ledger["dataset"].astype(str))
    without_donor = set(ledger.loc[ledger["donor"].astype(str) == "", "dataset"].astype(str))
    found = set(group) & names
    for name, cells in obs.groupby(group.to_numpy(), observed=True):
        of_donors, of_datasets = _seen(ledger, cells)
        if of_donors or any(not one.donor or one.dataset in without_donor for one in of_datasets):
            found.add(str(name))
    return found


def _seen(ledger: pd.DataFrame, obs: pd.DataFrame) -> tuple[list[Any], list[Any]]:
    """Return the origins of cells from donors of a ledger, and those of other cells of its data sets."""
    datasets_of: dict[str, set[str]] = {}
    for dataset, donor in zip(ledger["dataset"].astype(str), ledger["donor"].astype(str), strict=True):
        datasets_of.setdefault(donor, set()).add(dataset)
    datasets = set().union(*datasets_of.values()) - {""}
    of_donors, of_datasets = [], []
    for origin in _origins(obs).itertuples():
        # a donor is the same one only within a data set, where both name one
        same_name = datasets_of.get(origin.donor, set()) if origin.donor else set()
        if same_name and (not origin.dataset or same_name & {"", origin.dataset}):
            of_donors.append(origin)
        elif origin.dataset in datasets:
            of_datasets.append(origin)
    return of_donors, of_datasets


def _origins(obs: pd.DataFrame) -> pd.DataFrame:
    """Count the cells of each data set and donor; what is unknown is an empty text."""
    cells = pd.DataFrame({"dataset": _texts(obs, _DATASET), "donor": _texts(obs, _DONOR)})
    counted = cells.groupby(["dataset", "donor"], observed=True).size().rename("n_cells").reset_index()
    counted = counted.astype({"dataset": object, "donor": object})
    return counted[(counted["dataset"] != "") | (counted["donor"] != "")].reset_index(drop=True)


def _texts(obs: pd.DataFrame, names: tuple[str, ...]) -> pd.Categorical:
    """Return a column as texts; categories, because a text for each of many cells would take much memory."""
    column = _first(names, obs.columns)
    if column is None:
        return pd.Categorical.from_codes(np.zeros(len(obs), np.int8), [""])
    codes, values = pd.factorize(obs[column])
    texts = [*map(str, values), ""]  # the last one stands for missing values, whose code is -1
    categories = sorted(set(texts))
    return pd.Categorical.from_codes(pd.Index(categories).get_indexer(texts)[codes], categories)


def _first(names: tuple[str, ...], columns: Any) -> str | None:
    return next((name for name in names if name in columns), None)


def _draws(data: object, source: CellSource) -> Iterator[Mapping[str, Any]]:
    """Yield what :func:`scllm.datasets.census` wrote about each part of the data, in memory or in a file."""
    if isinstance(data, AnnData):
        yield data.uns.get(_keys.UNS, {}).get("census", {}).get("params", {})
        return
    for part in getattr(source, "parts", [source]):
        path = getattr(part, "path", None)
        if path is not None and path.suffix in (".h5ad", ".zarr"):
            file, key = AnnDataFile(path), f"uns/{_keys.UNS}/census/params"
            yield read_elem(file.root[key]) if key in file.root else {}
            file.close()
