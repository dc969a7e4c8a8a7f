"""Read predicted labels and their probabilities from AnnData, for reliability diagrams and ROC curves."""

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
    """One column of predictions, for the cells whose true label is known."""

    name: str
    color: str
    truth: NDArray[np.object_]
    probabilities: FloatArray  # (n, k)
    classes: NDArray[np.object_]
    fold: NDArray[np.integer] | None


def predictions(adata: AnnData, truth: str, predicted: str | Sequence[str] | None) -> list[Predictions]:
    """Read the given predictions; ``None``: those of model and baseline from ``cross_validate``."""
    labels = groups(adata.obs, truth)
    first = _keys.safe(truth) + _keys.CROSS_VALIDATED
    titles: dict[str, str] = {}
    if predicted is None:
        if first + _keys.PROBABILITIES not in adata.obsm:
            others = listed(_predicted(adata)) if _predicted(adata) else "a column that scllm.tl.classify wrote"
            raise KeyError(
                f"Expected {first + _keys.PROBABILITIES!r} in adata.obsm, but it is not there. Call "
                f"scllm.tl.cross_validate(adata, model, key={truth!r}) first, or pass predicted=: {others}."
            )
        titles = {first: "fine-tuned", first + _keys.BASELINE: "baseline"}
        names = [name for name in titles if name + _keys.PROBABILITIES in adata.obsm]
    else:
        given = [predicted] if isinstance(predicted, str) else list(predicted)
        names = [name.removesuffix(_keys.PROBABILITIES) for name in given]  # the key in obsm means the same
        if not names:
            raise ValueError("Expected at least one column of predictions in predicted=, got an empty list. Name one.")
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
            f"Expected cells with both a label in obs[{labels.name!r}] and probabilities in obsm[{key!r}], but there "
            "are none. Check both."
        )
    known = labels.to_numpy(dtype=object)[cells]
    if not np.isin(known, classes).any():
        raise ValueError(
            f"Expected common labels in obs[{labels.name!r}] and the predictions {name!r}, got "
            f"{listed(list(pd.unique(known)))} and {listed(list(classes))}. Pass the predicted column as truth=."
        )
    if len(cells) < is_known.sum():
        warn(
            f"{is_known.sum() - len(cells)} of {is_known.sum()} cells with a label in obs[{labels.name!r}] have no "
            f"probabilities in obsm[{key!r}] and are ignored."
        )
    found = adata.obs.get(name.removesuffix(_keys.BASELINE) + _keys.FOLD)
    fold = None if found is None else found.astype("category").cat.codes.to_numpy()[cells]
    return Predictions(title, color, known, probabilities[cells], classes, fold)


def _check_labels(adata: AnnData, name: str, classes: NDArray[np.object_]) -> None:
    """Raise if predicted labels are not among the classes, as after joining the data of several models."""
    if name not in adata.obs:
        return
    others = [label for label in groups(adata.obs, name).cat.categories if label not in {*classes, _keys.UNKNOWN}]
    if others:
        raise ValueError(
            f"Expected labels in obs[{name!r}] to be among {listed(list(classes))}, the recorded classes of "
            f"obsm[{name + _keys.PROBABILITIES!r}], got {listed(others)}. Labels were renamed, or cells of several "
            "models were joined. Call the function that wrote them again, on all cells."
        )


def _predicted(adata: AnnData) -> list[str]:
    """Return columns of predictions that have probabilities in ``obsm``."""
    return [key.removesuffix(_keys.PROBABILITIES) for key in adata.obsm if key.endswith(_keys.PROBABILITIES)]


def _classes(adata: AnnData, name: str, n_classes: int) -> NDArray[np.object_]:
    """Return names of the columns: as recorded by the function that wrote them, else the categories of the labels."""
    recorded = classes_of(adata, name)
    if len(recorded) == n_classes:
        return np.array(recorded, dtype=object)
    column = adata.obs.get(name)
    categories = [] if column is None or recorded else list(column.astype("category").cat.categories)
    if len(categories) != n_classes:
        seen = f"{len(recorded)} classes are recorded" if recorded else "the names of their classes are not recorded"
        raise ValueError(
            f"Expected {n_classes} classes, one for each column of obsm[{name + _keys.PROBABILITIES!r}], or as many "
            f"categories of obs[{name!r}], but {seen}. Call the function that wrote them again."
        )
    return np.array([str(category) for category in categories], dtype=object)
