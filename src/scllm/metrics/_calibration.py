"""Measure and correct the calibration of probabilities."""

from __future__ import annotations

from numbers import Integral

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scllm._typing import FloatArray, IntArray

__all__ = [
    "N_BINS",
    "all_labels",
    "best_class",
    "calibration_error",
    "expected_calibration_error",
    "reliability",
    "scored_labels",
    "temperature",
]

N_BINS = 15
_TEMPERATURES = (0.05, 20.0)


def expected_calibration_error(
    truth: ArrayLike, probabilities: FloatArray, classes: ArrayLike | None = None, *, n_bins: int = N_BINS
) -> float:
    """Compute the expected calibration error: the mean difference of confidence and accuracy, 0 (best) to 1.

    Cells are put into bins of equal width by the probability of their best class. In each bin, the mean probability is
    compared with the accuracy, and absolute differences are averaged, weighted by cells (Guo et al., "On calibration of
    modern neural networks", ICML 2017). Of the cells with a probability of 0.8, 80 % should be labelled correctly.

    Parameters
    ----------
    truth
        Labels, ``(n,)``.
    probabilities
        ``(n, k)``, one column for each of ``classes``.
    classes
        Names of the columns. ``None``: the sorted classes of ``truth``.
    n_bins
        Number of bins between 0 and 1.

    Examples
    --------
    >>> round(expected_calibration_error(["B", "T"], np.array([[0.9, 0.1], [0.8, 0.2]])), 3)
    0.45
    """
    confidence, correct = best_class(truth, probabilities, classes)
    return float(calibration_error(confidence, correct, n_bins, np.ones((1, len(correct))))[0])


def reliability(
    truth: ArrayLike, probabilities: FloatArray, classes: ArrayLike | None = None, *, n_bins: int = N_BINS
) -> pd.DataFrame:
    """Return the non-empty bins of :func:`expected_calibration_error`: ``confidence``, ``accuracy``, ``n_cells``."""
    confidence, correct = best_class(truth, probabilities, classes)
    cells = pd.DataFrame({"confidence": confidence, "accuracy": correct, "n_cells": 1})
    by_bin = cells.groupby(_bin_of(confidence, n_bins)).agg(
        {"confidence": "mean", "accuracy": "mean", "n_cells": "sum"}
    )
    return by_bin.rename_axis("bin")


def temperature(logits: FloatArray, labels: IntArray) -> float:
    """Find the temperature, the divisor of logits that calibrates probabilities.

    Fine-tuned networks are overconfident. Dividing logits by one number, which maximises the likelihood of the labels
    of held-out cells, corrects most of this without changing any label (temperature scaling; Guo et al., ICML 2017). A
    temperature above 1 lowers the confidence.

    Parameters
    ----------
    logits
        ``(n, k)``, before the softmax.
    labels
        Column of the true class of each cell, -1 if it is not known.

    Returns
    -------
    The temperature, between 0.05 and 20; 1 if no cell has a label.

    Examples
    --------
    >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    >>> round(temperature(logits, np.array([0, 0, 0, 1])), 2)  # 3 of 4 correct: 4 / log(3)
    3.64
    """
    labels = np.asarray(labels)
    cells = np.flatnonzero(labels >= 0)
    if not len(cells):
        return 1.0
    known, column = np.asarray(logits, np.float64)[cells], labels[cells]

    def surprise(log_scale: float) -> float:
        return float(-log_softmax(known / np.exp(log_scale), axis=1)[np.arange(len(column)), column].mean())

    limits = np.log(_TEMPERATURES)
    return float(np.exp(minimize_scalar(surprise, bounds=limits, method="bounded", options={"xatol": 1e-6}).x))


def best_class(truth: ArrayLike, probabilities: FloatArray, classes: ArrayLike | None) -> tuple[FloatArray, FloatArray]:
    """Return the probability of each cell's best class, and whether that is the true class."""
    truth, probabilities, names = scored_labels(truth, probabilities, classes)
    best = probabilities.argmax(axis=1)
    return probabilities[np.arange(len(best)), best], (names[best] == truth).astype(float)


def scored_labels(
    truth: ArrayLike, probabilities: ArrayLike, classes: ArrayLike | None
) -> tuple[NDArray, FloatArray, NDArray]:
    """Return labels, probabilities and names of their columns as arrays; raise if they do not match."""
    labels, found = all_labels(truth), np.asarray(probabilities, np.float64)
    names = np.unique(labels) if classes is None else np.asarray(classes)
    if found.shape != (len(labels), len(names)):
        raise ValueError(
            f"Expected probabilities of {len(labels)} cells by {len(names)} classes, got shape {found.shape}. Pass a "
            "row for each label, and the name of each column as classes=."
        )
    types = [pd.api.types.infer_dtype(values) for values in (labels, names)]
    if types[0] != types[1] and not np.isin(labels.astype(object), names.astype(object)).any():
        raise ValueError(
            f"Expected labels and classes of the same type, got labels of type {types[0]} (first: "
            f"{labels.tolist()[0]!r}) and classes of type {types[1]} (first: {names.tolist()[0]!r}). Pass both as "
            "strings, such as truth.astype(str)."
        )
    return labels, found, names


def all_labels(truth: ArrayLike) -> NDArray:
    """Return labels as an array; raise if some are missing."""
    labels = np.asarray(truth)
    n_missing = int(pd.isna(labels).sum())
    if n_missing:
        raise ValueError(
            f"Expected a label for each cell, but {n_missing} of {len(labels)} are missing. Remove those cells first."
        )
    return labels


def calibration_error(confidence: FloatArray, correct: FloatArray, n_bins: int, weights: FloatArray) -> FloatArray:
    """Average the difference of confidence and accuracy over bins of equal width, weighted by their cells."""
    place = _bin_of(confidence, n_bins)  # which also checks their number
    gap = confidence - correct
    gaps = np.array([np.bincount(place, gap * row, minlength=n_bins) for row in weights])
    return np.abs(gaps).sum(axis=1) / weights.sum(axis=1)


def _bin_of(confidence: FloatArray, n_bins: int) -> IntArray:
    """Return the bin ``(i / n_bins, (i + 1) / n_bins]`` of each confidence, as in Guo et al. 2017."""
    if isinstance(n_bins, bool) or not isinstance(n_bins, Integral) or n_bins < 1:
        raise ValueError(f"Expected n_bins to be an integer of at least 1, got {n_bins!r}. {N_BINS} is usual.")
    return np.clip(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0, n_bins - 1)
