"""Score predicted labels and values."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from scllm._typing import FloatArray, IntArray
from scllm.metrics._bootstrap import value_scores
from scllm.metrics._calibration import all_labels, expected_calibration_error, scored_labels

__all__ = ["class_f1", "classification_scores", "confusion", "mean_roc", "regression_scores"]


def classification_scores(
    truth: ArrayLike, predicted: ArrayLike, probabilities: FloatArray | None = None, classes: ArrayLike | None = None
) -> dict[str, float]:
    """Compute accuracy, macro F1 and balanced accuracy; with ``probabilities`` also areas under curves and calibration.

    Averages are over the classes of ``truth``. A prediction that is not among them ("unknown") counts as an error for
    the true class, but not as a class.

    Parameters
    ----------
    truth, predicted
        Labels, ``(n,)``.
    probabilities
        ``(n, k)``, one column for each of ``classes``. Classes with no cells or with all cells have no AUROC.
    classes
        Names of the columns. ``None``: the sorted classes of ``truth``.

    Returns
    -------
    ``accuracy``, ``macro_f1`` and ``balanced_accuracy``. With probabilities also ``auroc`` and ``auprc`` (average
    precision), which are means over classes of one class against the rest, and ``ece`` (0 is best), see
    :func:`expected_calibration_error`.

    Examples
    --------
    >>> scores = classification_scores(["B", "B", "T", "T"], ["B", "T", "T", "T"])
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'accuracy': 0.75, 'macro_f1': 0.733, 'balanced_accuracy': 0.75}
    """
    truth, predicted = all_labels(truth), np.asarray(predicted)
    known = np.unique(truth)
    scores = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=known, average="macro", zero_division=0)),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=known, average="macro", zero_division=0)),
    }
    if probabilities is not None:
        truth, probabilities, columns = scored_labels(truth, probabilities, classes)
        is_class = truth[:, None] == columns  # (n, k)
        scored = is_class.any(axis=0) & ~is_class.all(axis=0)
        for name, area in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
            areas = [area(is_class[:, k], probabilities[:, k]) for k in np.flatnonzero(scored)]
            scores[name] = float(np.mean(areas)) if areas else float("nan")
        scores["ece"] = expected_calibration_error(truth, probabilities, columns)
    return scores


def class_f1(truth: ArrayLike, predicted: ArrayLike, classes: ArrayLike) -> FloatArray:
    """Compute the F1 score of each class, ``(k,)``: the harmonic mean of precision and recall; NaN without cells.

    Examples
    --------
    >>> class_f1(["B", "B", "T", "T"], ["B", "T", "T", "T"], ["B", "T", "NK"]).round(3)
    array([0.667, 0.8  ,   nan])
    """
    truth, names = np.asarray(truth), np.asarray(classes)
    found = f1_score(truth, np.asarray(predicted), labels=names, average=None, zero_division=0)
    return np.where(np.isin(names, truth), found, np.nan)


def regression_scores(truth: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """Compute ``r2`` (below 0: worse than the mean), ``pearson`` and ``mae``, the mean absolute error (0 is best).

    ``r2`` and ``pearson`` are NaN if all values are equal.

    Examples
    --------
    >>> scores = regression_scores([1.0, 2.0, 3.0], [1.5, 2.0, 2.5])
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'r2': 0.75, 'pearson': 1.0, 'mae': 0.333}
    """
    truth = np.asarray(truth, float)
    found = value_scores(truth, np.asarray(predicted, float), np.ones((1, len(truth))))
    return {name: float(value[0]) for name, value in found.items()}


def mean_roc(
    truth: ArrayLike, probabilities: FloatArray, classes: ArrayLike | None = None, *, n_points: int = 201
) -> tuple[FloatArray, FloatArray]:
    """Compute ROC curves of one class against the rest, with true positive rates averaged over classes.

    Parameters
    ----------
    truth
        Labels, ``(n,)``.
    probabilities
        ``(n, k)``, one column for each of ``classes``. Classes with no cells or with all cells are ignored.
    classes
        Names of the columns. ``None``: the sorted classes of ``truth``.
    n_points
        Number of false positive rates between 0 and 1 at which curves are averaged.

    Returns
    -------
    False positive rates and mean true positive rates.
    """
    truth, probabilities, names = scored_labels(truth, probabilities, classes)
    is_class = truth[:, None] == names
    scored = np.flatnonzero(is_class.any(axis=0) & ~is_class.all(axis=0))
    false = np.linspace(0, 1, n_points)
    curves = [roc_curve(is_class[:, k], probabilities[:, k]) for k in scored]
    true = [np.interp(false, at, rate) for at, rate, _ in curves]
    return np.r_[0, false], np.r_[0, np.mean(true, axis=0) if true else np.full(n_points, np.nan)]


def confusion(truth: ArrayLike, predicted: ArrayLike, *, rows: ArrayLike, columns: ArrayLike) -> IntArray:
    """Count cells of each true class (row) by predicted class (column), ``(len(rows), len(columns))``.

    Examples
    --------
    >>> confusion(["B", "B", "T"], ["B", "unknown", "T"], rows=["B", "T"], columns=["B", "T", "unknown"])
    array([[1, 0, 1],
           [0, 1, 0]])
    """
    names = list(dict.fromkeys([*rows, *columns]))
    counts = confusion_matrix(np.asarray(truth), np.asarray(predicted), labels=names)
    place = {name: at for at, name in enumerate(names)}
    return counts[np.ix_([place[name] for name in rows], [place[name] for name in columns])]
