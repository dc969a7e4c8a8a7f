"""Scores of weighted cells, for many weightings at once: what bootstrap intervals in ``scllm.metrics`` are made of.

``weights`` is ``(r, n)`` throughout: how often each of ``n`` cells counts in each of ``r`` samples. Every score is
``(r,)``, NaN in a sample where it is not defined.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse

from scllm._calibration import N_BINS, all_labels, best_class, calibration_error, scored_labels
from scllm._typing import FloatArray, IntArray

__all__ = ["bootstrap_interval", "value_scores"]

_RESAMPLED = 2_000_000  # weights held at a time, 16 MB


def bootstrap_interval(
    truth: ArrayLike,
    predicted: ArrayLike,
    probabilities: FloatArray | None = None,
    classes: ArrayLike | None = None,
    *,
    groups: ArrayLike | None = None,
    n_resamples: int = 1000,
    level: float = 0.95,
    random_state: int = 0,
) -> dict[str, tuple[float, float]]:
    """Between which values each score would lie if other cells had been drawn.

    Cells are drawn anew with replacement, and quantiles of the scores are taken (percentile bootstrap). That covers the
    chance of which cells were tested, not that of training: for the latter train several times.

    Parameters
    ----------
    truth, predicted
        Labels or, as floats, values, ``(n,)``.
    probabilities
        ``(n, k)``, one column for each of ``classes``.
    classes
        Names of the columns; ``None`` = the sorted classes of ``truth``.
    groups
        Group (donor) of each cell. Groups are then drawn whole: cells of one donor are alike, and intervals that take
        them as independent are too narrow.
    n_resamples
        How often cells are drawn.
    level
        Share of the samples inside the interval.
    random_state
        Seed.

    Returns
    -------
    Lower and upper end for each score of :func:`classification_scores`, or of :func:`regression_scores`.

    Examples
    --------
    >>> low, high = bootstrap_interval(["B", "T"] * 50, ["B"] * 10 + ["B", "T"] * 45)["accuracy"]
    >>> 0.88 < low < 0.95 < high < 1
    True
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    unit = np.arange(len(truth)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    n_units = int(unit.max()) + 1
    rng = np.random.default_rng(random_state)
    chunk = max(1, _RESAMPLED // len(truth))
    parts = []
    for start in range(0, n_resamples, chunk):
        drawn = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=min(chunk, n_resamples - start))
        parts.append(_resampled_scores(truth, predicted, probabilities, classes, drawn[:, unit].astype(float)))
    tails = (1 - level) / 2, (1 + level) / 2
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = {name: values[~np.isnan(values)] for name, values in found.items()}
    return {
        name: tuple(np.quantile(values, tails).tolist()) if len(values) else (float("nan"),) * 2
        for name, values in found.items()
    }


def _resampled_scores(
    truth: ArrayLike,
    predicted: ArrayLike,
    probabilities: FloatArray | None,
    classes: ArrayLike | None,
    weights: FloatArray,
) -> dict[str, FloatArray]:
    """Scores of each row of weights, ``(r,)``."""
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    if np.issubdtype(truth.dtype, np.floating):
        return value_scores(truth.astype(float), predicted.astype(float), weights)
    known, code = np.unique(all_labels(truth), return_inverse=True)
    guess = pd.Index(known).get_indexer(predicted)
    found = label_scores(confusions(code, guess, len(known), weights))
    found.pop("f1")
    if probabilities is None:
        return found
    truth, probabilities, columns = scored_labels(truth, probabilities, classes)
    ranked = [
        ranking_scores(truth == name, probabilities[:, k], weights)
        for k, name in enumerate(columns)
        if 0 < (truth == name).sum() < len(truth)
    ]
    for name in ("auroc", "auprc"):
        each = np.array([areas[name] for areas in ranked]).reshape(-1, len(weights))
        found[name] = mean_there(each.T)
    confidence, correct = best_class(truth, probabilities, columns)
    return found | {"ece": calibration_error(confidence, correct, N_BINS, weights)}


def confusions(truth: IntArray, predicted: IntArray, n_classes: int, weights: FloatArray) -> FloatArray:
    """Weight of each true class by predicted class, ``(r, k, k + 1)``; the last column is any other prediction (-1)."""
    n_columns = n_classes + 1
    field = truth * n_columns + np.where(predicted < 0, n_classes, predicted)
    is_field = sparse.csr_matrix(
        (np.ones(len(field)), field, np.arange(len(field) + 1)), shape=(len(field), n_classes * n_columns)
    )
    return np.asarray(weights @ is_field).reshape(len(weights), n_classes, n_columns)


def label_scores(counts: FloatArray) -> dict[str, FloatArray]:
    """Accuracy, macro F1, balanced accuracy, and F1 of each class ``(r, k)``, of confusions ``(r, k, k + 1)``."""
    hit = np.diagonal(counts, axis1=1, axis2=2)  # (r, k)
    true, predicted = counts.sum(axis=2), counts[:, :, :-1].sum(axis=1)
    with np.errstate(invalid="ignore"):
        recall = hit / true
        f1 = np.where(true > 0, 2 * hit / (true + predicted), np.nan)
        return {
            "accuracy": hit.sum(axis=1) / true.sum(axis=1),
            "macro_f1": mean_there(f1),
            "balanced_accuracy": mean_there(recall),
            "f1": f1,
        }


def ranking_scores(is_class: FloatArray, score: FloatArray, weights: FloatArray) -> dict[str, FloatArray]:
    """Area under the ROC curve, pairs of equal score counting one half, and average precision."""
    inside, outside = _at_each_score(is_class, score, weights)
    lower = np.cumsum(outside, axis=1) - outside
    n_inside, n_outside = inside.sum(axis=1), outside.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (inside * (lower + outside / 2)).sum(axis=1) / (n_inside * n_outside)
    return {"auroc": np.where(n_inside * n_outside > 0, auroc, np.nan), "auprc": average_precision(inside, outside)}


def average_precision(inside: FloatArray, outside: FloatArray) -> FloatArray:
    """Precision at each score, averaged over the cells of the class; NaN without cells on either side."""
    hits, misses = (np.cumsum(part[:, ::-1], axis=1)[:, ::-1] for part in (inside, outside))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(inside > 0, hits / (hits + misses), 0)
        mean = (inside * precision).sum(axis=1) / inside.sum(axis=1)
    return np.where((inside.sum(axis=1) > 0) & (outside.sum(axis=1) > 0), mean, np.nan)


def value_scores(truth: FloatArray, predicted: FloatArray, weights: FloatArray) -> dict[str, FloatArray]:
    """Explained variance R², Pearson correlation and mean absolute error."""
    share = weights / weights.sum(axis=1, keepdims=True)
    # about the mean of all: differences of large squares would lose their digits
    t, p = truth - truth.mean(), predicted - truth.mean()
    mean_t, mean_p = share @ t, share @ p
    variance_t, variance_p = share @ t**2 - mean_t**2, share @ p**2 - mean_p**2
    tiny = np.finfo(float).eps * max(float(np.square(t).max(initial=0)), float(np.square(p).max(initial=0)))
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = np.where(variance_t > tiny, 1 - (share @ (t - p) ** 2) / variance_t, np.nan)
        pearson = (share @ (t * p) - mean_t * mean_p) / np.sqrt(variance_t * variance_p)
    defined = (variance_t > tiny) & (variance_p > tiny)
    return {"r2": r2, "pearson": np.where(defined, pearson, np.nan), "mae": share @ np.abs(t - p)}


def _at_each_score(is_class: FloatArray, score: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Weight of the class and of the rest at each distinct score, from low to high, ``(r, n_scores)``."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    sorted_weights, member = weights[:, order], is_class[order].astype(float)
    inside = np.add.reduceat(sorted_weights * member, starts, axis=1)
    return inside, np.add.reduceat(sorted_weights, starts, axis=1) - inside


def mean_there(values: FloatArray) -> FloatArray:
    """Mean over the classes that have a cell."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(axis=1) / there.sum(axis=1)
