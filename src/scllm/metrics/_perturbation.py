"""Score predicted changes of expression after perturbations, on plain arrays of perturbations by genes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from scllm._typing import FloatArray

__all__ = ["LOWER_IS_BETTER", "PERTURBATION_METRICS", "MeasuredChange", "discrimination", "perturbation_scores"]

PERTURBATION_METRICS = (
    "pearson", "pearson_top20", "mse", "weighted_mse", "discrimination", "direction", "overlap", "lfc_error",
)  # fmt: skip
LOWER_IS_BETTER = ("mse", "weighted_mse", "lfc_error")

_TOP, _ALPHA = 20, 0.05


@dataclass(frozen=True)
class MeasuredChange:
    """Measured change of each gene after each perturbation.

    Parameters
    ----------
    change
        Mean expression after the perturbation minus that of controls, ``(p, g)``.
    t
        Welch's t statistic of the change, ``(p, g)``.
    degrees
        Its degrees of freedom, ``(p, g)``.
    """

    change: FloatArray
    t: FloatArray
    degrees: FloatArray

    def significant(self, scored: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which genes change, at a false discovery rate of 5 % among the scored genes of each perturbation."""
        p = 2 * stats.t.sf(np.abs(self.t), self.degrees)
        found = np.zeros(self.t.shape, bool)
        for row in range(len(p)):
            usable = scored[row] & np.isfinite(p[row])
            if usable.any():
                found[row, usable] = stats.false_discovery_control(p[row, usable]) < _ALPHA
        return found


def perturbation_scores(
    predicted: FloatArray, measured: MeasuredChange, own: NDArray[np.bool_]
) -> dict[str, FloatArray]:
    """Score predicted changes, ``(p, g)``, by each metric, ``(p,)``; NaN where a score is not defined.

    Parameters
    ----------
    predicted
        Predicted changes; a row of NaN has no prediction.
    measured
        Measured changes.
    own
        Perturbed genes of each perturbation, ``(p, g)``, which are left out.

    Returns
    -------
    - ``pearson``: correlation of predicted and measured change over all genes.
    - ``pearson_top20``: the same over the 20 genes with the largest t statistics of the measured change.
    - ``mse``: mean squared error; ``weighted_mse``: weighted by the squared t statistic.
    - ``discrimination``: share of the other perturbations whose measured change is less similar (by cosine) to the
      prediction than that of the perturbation itself; without the perturbed genes of all perturbations.
    - ``direction``: share of significant genes whose change has the predicted sign.
    - ``overlap``: share of the significant genes among as many genes with the largest predicted changes.
    - ``lfc_error``: mean absolute error over the significant genes, divided by their mean absolute change.
    """
    scored = ~own
    significant = measured.significant(scored)
    found = {name: np.full(len(predicted), np.nan) for name in PERTURBATION_METRICS}
    for row in np.flatnonzero(np.isfinite(predicted).all(1)):
        keep = scored[row]
        guess, truth = predicted[row, keep], measured.change[row, keep]
        strength = np.abs(np.nan_to_num(measured.t[row, keep]))
        top = np.argsort(-strength, kind="stable")[:_TOP]
        found["pearson"][row] = _pearson(guess, truth)
        found["pearson_top20"][row] = _pearson(guess[top], truth[top])
        error = (guess - truth) ** 2
        found["mse"][row] = error.mean()
        if strength.any():
            found["weighted_mse"][row] = np.average(error, weights=strength**2)
        _score_significant(found, row, guess, truth, significant[row, keep])
    found["discrimination"] = discrimination(predicted, measured.change, own)
    return found


def _score_significant(
    found: dict[str, FloatArray], row: int, guess: FloatArray, truth: FloatArray, significant: NDArray[np.bool_]
) -> None:
    """Score one perturbation on its significant genes, if there are any."""
    n = int(significant.sum())
    if not n:
        return
    found["direction"][row] = (np.sign(guess[significant]) == np.sign(truth[significant])).mean()
    found["lfc_error"][row] = np.abs(guess - truth)[significant].mean() / np.abs(truth[significant]).mean()
    if np.ptp(np.abs(guess)) > 0:
        highest = np.argsort(-np.abs(guess), kind="stable")[:n]
        found["overlap"][row] = significant[highest].mean()


def discrimination(predicted: FloatArray, measured: FloatArray, own: NDArray[np.bool_]) -> FloatArray:
    """Rank the measured change of each perturbation among all by similarity to its prediction, 1 = nearest, ``(p,)``.

    Ties get the mean rank, so a prediction of no change scores 0.5.
    """
    keep = ~own.any(0)
    scores = np.full(len(predicted), np.nan)
    if len(predicted) < 2:
        return scores
    similarity = _unit(predicted[:, keep]) @ _unit(measured[:, keep]).T
    for row in np.flatnonzero(np.isfinite(predicted).all(1)):
        nearer = (similarity[row] > similarity[row, row]).sum()
        equal = (similarity[row] == similarity[row, row]).sum()
        scores[row] = 1 - (nearer + (equal - 1) / 2) / (len(predicted) - 1)
    return scores


def _unit(x: FloatArray) -> FloatArray:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def _pearson(x: FloatArray, y: FloatArray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
