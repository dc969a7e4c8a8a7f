"""What is predicted out of fold, whether folds can tell, and the scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scllm import metrics
from scllm._checks import labels, missing_key, obs_column
from scllm._typing import FloatArray, IntArray

__all__ = ["METHODS", "Target", "check_folds", "find_groups", "find_target", "fold_scores", "overall_scores"]

METHODS = ("model", "baseline")


@dataclass(frozen=True)
class Target:
    """A column of ``obs``: codes of ``classes`` (-1: missing), or with ``classes=None`` values (NaN: missing)."""

    key: str
    classes: tuple[str, ...] | None
    column: NDArray

    @property
    def is_there(self) -> NDArray[np.bool_]:
        """Which cells have a label or value."""
        return np.isfinite(self.column) if self.classes is None else self.column >= 0

    @property
    def n_outputs(self) -> int:
        """Numbers that a method says of each cell."""
        return 1 if self.classes is None else len(self.classes)

    def names(self, codes: IntArray) -> NDArray[np.object_]:
        """Classes by their codes."""
        return np.array(self.classes, dtype=object)[codes]

    def check_coverage(self, fold: IntArray) -> None:
        """Raise where a fold leaves one label to train on; warn of labels that a fold tests and no other fold has."""
        if self.classes is None:
            return
        there = fold >= 0
        counts = np.zeros((fold.max() + 1, len(self.classes)), np.int64)
        np.add.at(counts, (fold[there], self.column[there]), 1)
        trained = counts.sum(axis=0) - counts
        if ((trained > 0).sum(axis=1) < 2).any():
            raise ValueError(
                f"without fold {int((trained > 0).sum(axis=1).argmin())} the cells hold fewer than 2 labels of "
                f"obs[{self.key!r}], at least 2 to train on expected. Pass another group_key: "
                "groups of this one hold one label each."
            )
        lost = [name for k, name in enumerate(self.classes) if ((trained[:, k] == 0) & (counts[:, k] > 0)).any()]
        if lost:
            _warn(
                f"{len(lost)} labels of obs[{self.key!r}] (first: {lost[0]!r}) are in one fold only, two expected: "
                "they are tested where no training cell has them, and all count as missed. Merge or drop them."
            )


def find_target(obs: pd.DataFrame, key: str) -> Target:
    """The column to predict; an error where it is neither labels nor values."""
    if not isinstance(key, str):
        raise TypeError(f"key is {key!r}, the name of one column of obs expected. Call cross_validate for each column.")
    column = obs_column(obs, key)
    if pd.api.types.is_integer_dtype(column):
        raise ValueError(
            f"obs[{key!r}] holds integers (first: {column.iloc[0]}), labels or float values expected. If they are "
            f"labels: adata.obs[{key!r}] = adata.obs[{key!r}].astype('category'); if they are values: .astype(float)."
        )
    if pd.api.types.is_float_dtype(column):
        values = column.to_numpy(np.float64, na_value=np.nan)
        target = Target(key, None, values)
        if len(np.unique(values[target.is_there])) < 2:
            raise ValueError(
                f"obs[{key!r}] holds {len(np.unique(values[target.is_there]))} distinct values, at least 2 expected. "
                "Pass another column with `key=`."
            )
    else:
        classes = labels(obs, key)
        target = Target(key, tuple(classes.cat.categories), classes.cat.codes.to_numpy().astype(np.int64))
    n_missing = int((~target.is_there).sum())
    if n_missing:
        what = "value" if target.classes is None else "label"
        _warn(
            f"{n_missing} of {len(obs)} cells have no {what} in obs[{key!r}] and are left out. Drop them to "
            "silence this."
        )
    return target


def find_groups(obs: pd.DataFrame, group_key: str | None, target: Target) -> IntArray | None:
    """Group of each cell, numbered in the order of their names; -1 for cells that are left out."""
    if group_key is None:
        return None
    if group_key not in obs:
        raise missing_key(group_key, obs.columns, "a column of adata.obs")
    column = obs[group_key]
    lacking = np.flatnonzero(column.isna().to_numpy() & target.is_there)
    if len(lacking):
        raise ValueError(
            f"{len(lacking)} cells with a label have no group in obs[{group_key!r}] (first: "
            f"{obs.index[lacking[0]]!r}), one for every cell expected. Fill them in, or drop those cells."
        )
    codes, _ = pd.factorize(column.where(target.is_there).astype(object).map(str, na_action="ignore"), sort=True)
    return codes


def check_folds(target: Target, groups: IntArray | None, n_folds: int, n_repeats: int, group_key: str | None) -> None:
    """Raise where there are not as many folds to be had, and warn of labels that are not in every fold."""
    if n_folds < 2 or n_repeats < 1:
        raise ValueError(f"n_folds={n_folds} and n_repeats={n_repeats}, at least 2 and 1 expected. 5 folds are usual.")
    n_groups = n_folds if groups is None else int(groups.max()) + 1
    if n_groups < n_folds:
        remedy = f"n_folds={n_groups} to leave one group out at a time, or " if n_groups > 1 else ""
        raise ValueError(
            f"obs[{group_key!r}] holds {n_groups} groups, at least n_folds={n_folds} expected: groups are never "
            f"divided. Pass {remedy}another group_key."
        )
    n_cells = int(target.is_there.sum())
    if target.classes is None:
        if n_cells < n_folds:
            raise ValueError(f"{n_cells} cells have a value, at least n_folds={n_folds} expected. Pass fewer folds.")
        return
    sizes = np.bincount(target.column[target.is_there], minlength=len(target.classes))
    rare = np.flatnonzero(sizes < n_folds)
    if len(rare) == len(sizes):
        raise ValueError(
            f"all {len(sizes)} labels of obs[{target.key!r}] have fewer cells than folds (first: "
            f"{target.classes[0]!r}, {sizes[0]}), at least n_folds={n_folds} expected. {_advice(target)}"
        )
    if len(rare):
        _warn(
            f"{len(rare)} labels of obs[{target.key!r}] have fewer cells than folds (first: "
            f"{target.classes[rare[0]]!r}, {sizes[rare[0]]}), at least n_folds={n_folds} expected: they are not in "
            "every fold, and scores of folds are means over the labels that are there. Merge or drop them."
        )


def fold_scores(target: Target, cells: IntArray, outputs: FloatArray) -> pd.DataFrame:
    """Metrics of one method on the cells of one fold, then F1 of each class, one a row."""
    if target.classes is None:
        found = metrics.regression_scores(target.column[cells], outputs[:, 0])
        return _rows(found.items(), len(cells))
    truth, predicted = target.names(target.column[cells]), target.names(outputs.argmax(axis=1))
    found = metrics.classification_scores(truth, predicted, outputs, target.classes)
    f1 = metrics.class_f1(truth, predicted, target.classes)
    sizes = np.bincount(target.column[cells], minlength=len(f1))
    of_classes = pd.DataFrame({"metric": "f1", "class": target.classes, "n_cells": sizes, "value": f1})
    return pd.concat([_rows(found.items(), len(cells)), of_classes[sizes > 0]], ignore_index=True)


def overall_scores(target: Target, outputs: FloatArray, groups: IntArray | None, seed: int) -> pd.DataFrame:
    """Metrics of one method on all cells together, with bootstrap intervals."""
    cells = np.flatnonzero(target.is_there)
    outputs, units = outputs[cells], None if groups is None else groups[cells]
    if target.classes is None:
        truth, predicted = target.column[cells], outputs[:, 0]
        found = metrics.regression_scores(truth, predicted)
        ends = metrics.bootstrap_interval(truth, predicted, groups=units, random_state=seed)
    else:
        truth, predicted = target.names(target.column[cells]), target.names(outputs.argmax(axis=1))
        scored = (truth.astype(str), predicted.astype(str), outputs, np.array(target.classes))
        found = metrics.classification_scores(*scored)
        ends = metrics.bootstrap_interval(*scored, groups=units, random_state=seed)
    rows = [{"metric": name, "value": found[name], "low": low, "high": high} for name, (low, high) in ends.items()]
    return pd.DataFrame(rows)


def _rows(scores: Iterable[tuple[str, float]], n_cells: int) -> pd.DataFrame:
    names, values = zip(*scores, strict=True)
    missing = pd.Series([None] * len(names), dtype=object)
    return pd.DataFrame({"metric": names, "class": missing, "n_cells": n_cells, "value": values})


def _advice(target: Target) -> str:
    """Numbers that were read as text look like labels that no two cells share."""
    numbers = pd.to_numeric(pd.Series(target.classes), errors="coerce").notna().all()
    if numbers:
        return f"If they are values: adata.obs[{target.key!r}] = adata.obs[{target.key!r}].astype(float)."
    return "Pass a column with fewer labels with `key=`, or fewer folds."


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
