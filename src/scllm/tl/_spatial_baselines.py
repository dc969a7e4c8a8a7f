"""Baselines of predicting expression from image features, with settings chosen within the training spots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from scllm import metrics
from scllm._typing import FloatArray, IntArray

__all__ = ["knn_prediction", "mean_prediction", "ridge_prediction"]

PENALTIES = tuple(np.logspace(-1, 6, 15))
NUMBERS = (5, 10, 20, 40)
_FARTHEST = 10.0  # standard deviations to which features are clipped, as in the spatial family
_SAME = 1e-3  # difference of mean correlations that counts as none

Fit = Callable[[Any, FloatArray, FloatArray, FloatArray], FloatArray]


def mean_prediction(expression: FloatArray, n: int) -> FloatArray:
    """Predict the mean expression of the training spots for each of ``n`` spots."""
    return np.tile(expression.mean(axis=0), (n, 1))


def ridge_prediction(
    features: FloatArray, expression: FloatArray, fold: IntArray, new: FloatArray
) -> tuple[FloatArray, float]:
    """Predict by ridge regression on standardised features; return the chosen penalty too.

    Parameters
    ----------
    features, expression
        Training spots, ``(n, d)`` and ``(n, g)``.
    fold
        Fold of each training spot in the inner cross-validation: its section, or its block if there is one section.
    new
        Features of the spots to predict, ``(m, d)``.
    """
    chosen = _chosen(PENALTIES, _ridge, features, expression, fold)
    return _ridge(chosen, features, expression, new), float(chosen)


def knn_prediction(
    features: FloatArray, expression: FloatArray, fold: IntArray, new: FloatArray
) -> tuple[FloatArray, int]:
    """Predict the mean expression of the training spots with the most similar features; see above."""
    chosen = _chosen(NUMBERS, _knn, features, expression, fold)
    return _knn(chosen, features, expression, new), int(chosen)


def _chosen(settings: Sequence[Any], fit: Fit, features: FloatArray, expression: FloatArray, fold: IntArray) -> Any:
    """Return the first setting whose mean correlation per gene within the held-out folds is as good as the best.

    Correlation does not change as predictions shrink, so of many large penalties that are equally good the smallest is
    taken.
    """
    scores = []
    for setting in settings:
        of_folds = [
            metrics.pearson(expression[test], fit(setting, features[train], expression[train], features[test]))
            for train, test in _folds(fold)
        ]
        scores.append(np.mean([np.nanmean(score) for score in of_folds]))
    return settings[int(np.argmax(np.array(scores) >= max(scores) - _SAME))]


def _folds(fold: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    for one in np.unique(fold):
        yield np.flatnonzero(fold != one), np.flatnonzero(fold == one)


def _scaled(features: FloatArray, new: FloatArray) -> tuple[FloatArray, FloatArray]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    # a feature that hardly varies in training may be far away elsewhere
    return tuple(np.clip(scaler.transform(part), -_FARTHEST, _FARTHEST) for part in (features, new))


def _ridge(penalty: float, features: FloatArray, expression: FloatArray, new: FloatArray) -> FloatArray:
    from sklearn.linear_model import Ridge

    features, new = _scaled(features, new)
    return Ridge(alpha=penalty).fit(features, expression).predict(new)


def _knn(k: int, features: FloatArray, expression: FloatArray, new: FloatArray) -> FloatArray:
    from sklearn.neighbors import KNeighborsRegressor

    features, new = _scaled(features, new)
    return KNeighborsRegressor(n_neighbors=min(k, len(features))).fit(features, expression).predict(new)
