"""Labels with probabilities, as verbs leave them on an AnnData: for reliability diagrams and ROC curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from scllm import _keys
from scllm._checks import groups, missing_key
from scllm._log import warn
from scllm._names import listed
from scllm._results import classes_of
from scllm._typing import FloatArray
from scllm.pl._axes import GREY, colors

__all__ = ["Predictions", "predictions"]


@dataclass(frozen=True)
class Predictions:
    """What one column of predictions says of the cells whose label is known."""

    name: str
    color: str
    truth: NDArray[np.object_]
    probabilities: FloatArray  # (n, k)
    classes: NDArray[np.object_]
    fold: NDArray[np.integer] | None


def predictions(adata: AnnData, truth: str, predicted: str | Sequence[str] | None) -> list[Predictions]:
    """Each of the predictions; ``None``: model and, if there is one, baseline of ``cross_validate``."""
    labels = groups(adata.obs, truth)
    first = truth + _keys.CROSS_VALIDATED
    titles: dict[str, str] = {}
    if predicted is None:
        if first + _keys.PROBABILITIES not in adata.obsm:
            others = listed(_predicted(adata)) if _predicted(adata) else "a column that scllm.tl.classify wrote"
            raise KeyError(
                f"{first + _keys.PROBABILITIES!r} is not in adata.obsm, what scllm.tl.cross_validate(adata, model, "
                f"key={truth!r}) writes expected. Call it first, or pass `predicted=`: {others}."
            )
        titles = {first: "fine-tuned", first + _keys.BASELINE: "baseline"}
        names = [name for name in titles if name + _keys.PROBABILITIES in adata.obsm]
    else:
        given = [predicted] if isinstance(predicted, str) else list(predicted)
        names = [name.removesuffix(_keys.PROBABILITIES) for name in given]  # the key in obsm means the same
        if not names:
            raise ValueError("predicted is an empty list, one column of predictions expected at least. Name it.")
    shades = dict(zip(names, colors(len(names)), strict=True)) | {first + _keys.BASELINE: GREY}
    return [_of_column(adata, labels, name, titles.get(name, name), shades[name]) for name in names]


def _of_column(adata: AnnData, labels: pd.Series, name: str, title: str, color: str) -> Predictions:
    key = name + _keys.PROBABILITIES
    if key not in adata.obsm:
        advice = "scllm.tl.classify and scllm.tl.cross_validate write probabilities of labels, not of values."
        raise missing_key(name, _predicted(adata), f"a prediction with probabilities (obsm[{key!r}])", advice)
    probabilities = np.asarray(adata.obsm[key], dtype=float)
    classes = _classes(adata, name, probabilities.shape[1])
    _check_labels(adata, name, classes)
    is_known, is_there = labels.notna().to_numpy(), np.isfinite(probabilities).all(axis=1)
    cells = np.flatnonzero(is_known & is_there)
    if not len(cells):
        raise ValueError(
            f"no cell has both a label in obs[{labels.name!r}] and probabilities in obsm[{key!r}], some expected. "
            "Check both."
        )
    known = labels.to_numpy(dtype=object)[cells]
    if not np.isin(known, classes).any():
        raise ValueError(
            f"obs[{labels.name!r}] holds {listed(list(pd.unique(known)))}, and {name!r} is one of "
            f"{listed(list(classes))}, labels in common expected. Pass the column that was predicted as truth=."
        )
    if len(cells) < is_known.sum():
        warn(
            f"{is_known.sum() - len(cells)} of {is_known.sum()} cells with a label in obs[{labels.name!r}] have no "
            f"probabilities in obsm[{key!r}], all expected: they are left out."
        )
    found = adata.obs.get(name.removesuffix(_keys.BASELINE) + _keys.FOLD)
    fold = None if found is None else found.astype("category").cat.codes.to_numpy()[cells]
    return Predictions(title, color, known, probabilities[cells], classes, fold)


def _check_labels(adata: AnnData, name: str, classes: NDArray[np.object_]) -> None:
    """Raise where predicted labels are none of the classes: data of several models were joined under one's names."""
    if name not in adata.obs:
        return
    others = [label for label in groups(adata.obs, name).cat.categories if label not in {*classes, _keys.UNKNOWN}]
    if others:
        raise ValueError(
            f"obs[{name!r}] holds {listed(others)}, and the columns of obsm[{name + _keys.PROBABILITIES!r}] are "
            f"recorded as {listed(list(classes))}, labels out of those expected: they were renamed, or cells of "
            "several models joined. Call the verb that wrote them again, on all cells."
        )


def _predicted(adata: AnnData) -> list[str]:
    """Columns of predictions that have probabilities in ``obsm``."""
    return [key.removesuffix(_keys.PROBABILITIES) for key in adata.obsm if key.endswith(_keys.PROBABILITIES)]


def _classes(adata: AnnData, name: str, n_classes: int) -> NDArray[np.object_]:
    """Names of the columns: what the verb that wrote them recorded, else the categories of the labels themselves."""
    recorded = classes_of(adata, name)
    if len(recorded) == n_classes:
        return np.array(recorded, dtype=object)
    column = adata.obs.get(name)
    categories = [] if column is None or recorded else list(column.astype("category").cat.categories)
    if len(categories) != n_classes:
        seen = f"{len(recorded)} classes are recorded" if recorded else "the names of their classes are not recorded"
        raise ValueError(
            f"obsm[{name + _keys.PROBABILITIES!r}] has {n_classes} columns, and {seen}; {n_classes} classes or "
            f"categories of obs[{name!r}] expected. Call the verb that wrote them again."
        )
    return np.array([str(category) for category in categories], dtype=object)
