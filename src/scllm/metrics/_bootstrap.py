"""Scores of weighted cells, for many weightings at once: what bootstrap intervals in ``scllm.metrics`` are made of.

``weights`` is ``(r, n)`` throughout: how often each of ``n`` cells counts in each of ``r`` samples. Every score is
``(r,)``, NaN in a sample where it is not defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from scllm._typing import FloatArray, IntArray
from scllm.kernels.areas import Ranking
from scllm.metrics._calibration import N_BINS, all_labels, best_class, calibration_error, scored_labels

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
        Fraction of the samples inside the interval.
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
    score = _scorer(truth, predicted, probabilities, classes)
    parts = [score(weights) for weights in _draws(unit, n_resamples, random_state)]
    tails = (1 - level) / 2, (1 + level) / 2
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = {name: values[~np.isnan(values)] for name, values in found.items()}
    return {
        name: tuple(np.quantile(values, tails).tolist()) if len(values) else (float("nan"),) * 2
        for name, values in found.items()
    }


def _draws(unit: IntArray, n_resamples: int, random_state: int) -> Iterator[IntArray]:
    """How often each cell is drawn, ``(r, n)``, a limited number of samples at a time."""
    n_units = int(unit.max()) + 1
    rng = np.random.default_rng(random_state)
    chunk = max(1, _RESAMPLED // len(unit))
    for start in range(0, n_resamples, chunk):
        drawn = rng.multinomial(n_units, np.full(n_units, 1 / n_units), size=min(chunk, n_resamples - start))
        # int32: half as much to read, and scores read weights in as many orders as there are classes
        yield drawn.astype(np.int32)[:, unit]


def _scorer(
    truth: NDArray, predicted: NDArray, probabilities: FloatArray | None, classes: ArrayLike | None
) -> Callable[[IntArray], dict[str, FloatArray]]:
    """What turns weights into scores; whatever does not depend on the weights is computed here, once."""
    if np.issubdtype(truth.dtype, np.floating):
        return partial(value_scores, truth.astype(float), predicted.astype(float))
    known, code = np.unique(all_labels(truth), return_inverse=True)
    guess = pd.Index(known).get_indexer(predicted)
    if probabilities is None:
        return lambda weights: _label_means(code, guess, len(known), weights)
    truth, probabilities, columns = scored_labels(truth, probabilities, classes)
    ranked = [
        Ranking(probabilities[:, k], truth == name)
        for k, name in enumerate(columns)
        if 0 < (truth == name).sum() < len(truth)
    ]
    confidence, correct = best_class(truth, probabilities, columns)
    return lambda weights: {
        **_label_means(code, guess, len(known), weights),
        **_area_means(ranked, weights),
        "ece": calibration_error(confidence, correct, N_BINS, weights),
    }


def _label_means(truth: IntArray, predicted: IntArray, n_classes: int, weights: IntArray) -> dict[str, FloatArray]:
    found = label_scores(confusions(truth, predicted, n_classes, weights))
    return {name: values for name, values in found.items() if name != "f1"}


def _area_means(ranked: Sequence[Ranking], weights: IntArray) -> dict[str, FloatArray]:
    """Mean over classes of the area under the ROC curve and of the average precision."""
    areas = np.array([ranking.areas(weights) for ranking in ranked]).reshape(-1, 2, len(weights))
    return {name: mean_there(areas[:, at].T) for at, name in enumerate(("auroc", "auprc"))}


def confusions(truth: IntArray, predicted: IntArray, n_classes: int, weights: IntArray) -> FloatArray:
    """Weight of each true class by predicted class, ``(r, k, k + 1)``; the last column is any other prediction (-1)."""
    n_columns = n_classes + 1
    field = truth * n_columns + np.where(predicted < 0, n_classes, predicted)
    counts = [np.bincount(field, row, minlength=n_classes * n_columns) for row in weights]
    return np.reshape(counts, (len(weights), n_classes, n_columns))


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


def mean_there(values: FloatArray) -> FloatArray:
    """Mean over the classes that have a cell."""
    there = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0).sum(axis=1) / there.sum(axis=1)
