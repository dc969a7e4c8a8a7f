"""Check that folds allow a fair evaluation, and compute the scores of out-of-fold predictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral

import numpy as np
import pandas as pd

from scllm import metrics
from scllm._checks import missing_key
from scllm._log import warn
from scllm._names import listed
from scllm._typing import FloatArray, IntArray
from scllm.tl._target import Target

__all__ = ["check_coverage", "check_folds", "find_groups", "fold_scores", "overall_scores"]


def find_groups(obs: pd.DataFrame, group_key: str | None, target: Target) -> IntArray | None:
    """Return the group of each cell, numbered in the order of group names; -1 for cells without a label or value."""
    if group_key is None:
        return None
    if group_key not in obs:
        raise missing_key(group_key, obs.columns, "a column of adata.obs")
    column = obs[group_key]
    lacking = np.flatnonzero(column.isna().to_numpy() & target.is_there)
    if len(lacking):
        raise ValueError(
            f"Expected a group for every cell, but {len(lacking)} cells with a label have no group in "
            f"obs[{group_key!r}] (first: {obs.index[lacking[0]]!r}). Fill them in, or drop those cells."
        )
    codes, _ = pd.factorize(column.where(target.is_there).astype(object).map(str, na_action="ignore"), sort=True)
    return codes


def check_folds(target: Target, groups: IntArray | None, n_folds: int, n_repeats: int, group_key: str | None) -> None:
    """Raise if the data do not allow so many folds, and warn of labels that cannot be in every fold."""
    if not (isinstance(n_folds, Integral) and isinstance(n_repeats, Integral)) or n_folds < 2 or n_repeats < 1:
        raise ValueError(
            f"Expected a whole number of at least 2 for n_folds and of at least 1 for n_repeats, got "
            f"n_folds={n_folds!r} and n_repeats={n_repeats!r}. Pass for example n_folds=5."
        )
    n_groups = n_folds if groups is None else int(groups.max()) + 1
    if n_groups < n_folds:
        remedy = f"n_folds={n_groups} to leave one group out at a time, or " if n_groups > 1 else ""
        raise ValueError(
            f"Expected at least n_folds={n_folds} groups in obs[{group_key!r}], got {n_groups}. Groups are never split "
            f"between folds. Pass {remedy}another group_key."
        )
    n_cells = int(target.is_there.sum())
    if target.classes is None:
        if n_cells < n_folds:
            raise ValueError(
                f"Expected at least n_folds={n_folds} cells with a value in obs[{target.key!r}], got {n_cells}. Pass "
                "fewer folds."
            )
        return
    sizes = target.counts(np.arange(len(target.column)))
    rare = np.flatnonzero(sizes < n_folds)
    if len(rare) == len(sizes):
        raise ValueError(
            f"Expected labels with at least n_folds={n_folds} cells, but all {len(sizes)} labels of "
            f"obs[{target.key!r}] have fewer (first: {target.classes[0]!r}, {sizes[0]}). {target.advice}"
        )
    if len(rare):
        warn(
            f"Labels of obs[{target.key!r}] with fewer cells than n_folds={n_folds} are missing from some folds: "
            f"{listed(target.classes[i] for i in rare)}. The scores of a fold are means over the labels that it "
            "contains. Merge or drop these labels to have all in every fold."
        )


def check_coverage(target: Target, folds: Sequence[IntArray]) -> None:
    """Raise if a fold leaves fewer than two labels to train on; warn of labels that only one fold contains.

    ``folds`` has one array for each repeat.
    """
    if target.classes is None:
        return
    lost = {name for fold in folds for name in _lost(target, fold)}
    if lost:
        warn(
            f"Labels of obs[{target.key!r}] are in one fold only: {listed(sorted(lost))}. When that fold is tested, no "
            "training cell has them, and all their cells count as errors. Merge or drop these labels to avoid this."
        )


def _lost(target: Target, fold: IntArray) -> list[str]:
    """List the labels that only one fold contains."""
    assert target.classes is not None
    there = fold >= 0
    counts = np.zeros((fold.max() + 1, len(target.classes)), np.int64)
    np.add.at(counts, (fold[there], target.column[there]), 1)
    trained = counts.sum(axis=0) - counts
    if ((trained > 0).sum(axis=1) < 2).any():
        raise ValueError(
            f"Expected at least 2 labels of obs[{target.key!r}] to train on, but without fold "
            f"{int((trained > 0).sum(axis=1).argmin())} the cells have fewer. Pass another group_key, whose groups "
            "contain several labels each."
        )
    return [name for k, name in enumerate(target.classes) if ((trained[:, k] == 0) & (counts[:, k] > 0)).any()]


def fold_scores(target: Target, cells: IntArray, outputs: FloatArray) -> pd.DataFrame:
    """Compute the metrics of one method on one fold, then F1 of each class, one per row."""
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
    """Compute the metrics of one method on all cells, with 95 % bootstrap confidence intervals."""
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
