"""Score predictions of perturbations beside baselines and the replicate ceiling, on the same halves of the cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scllm import metrics
from scllm._typing import CSR, FloatArray, IntArray
from scllm.tl._perturbation_baselines import MEAN
from scllm.tl._perturbed_cells import Screen, half_changes

__all__ = ["REPLICATE", "Scores", "abstention", "score"]

REPLICATE = "replicate"
N_SPLITS = 20
_N_RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """Scores of each perturbation, and their means with intervals."""

    table: pd.DataFrame
    summary: pd.DataFrame


def score(
    x: CSR,
    screen: Screen,
    asked: IntArray,
    predicted: Mapping[str, FloatArray],
    own: NDArray[np.bool_],
    has_genes: NDArray[np.bool_],
    *,
    random_state: int = 0,
) -> Scores:
    """Score predictions against one half of the cells of each held-out perturbation, averaged over 20 splits.

    Parameters
    ----------
    x
        ``log1p`` of normalised expression of all cells.
    screen
        What the cells are.
    asked
        Held-out perturbations.
    predicted
        Predicted changes of each method, ``(n_asked, g)``.
    own
        Perturbed genes, which are not scored, ``(n_asked, g)``.
    has_genes
        Perturbations whose genes are all measured, which a model can predict.
    random_state
        Seed of the splits.
    """
    runs: list[dict[str, dict[str, FloatArray]]] = []
    for split in range(N_SPLITS):
        first, second = half_changes(x, screen, asked.tolist(), random_state + split)
        methods = {**predicted, REPLICATE: first.change}
        runs.append({name: metrics.perturbation_scores(guess, second, own) for name, guess in methods.items()})
    n_cells = [len(screen.cells(p)) for p in asked]
    parts = []
    for metric in metrics.PERTURBATION_METRICS:
        of_split = {name: np.array([run[name][metric] for run in runs]) for name in runs[0]}  # (splits, p)
        gap = of_split[REPLICATE] - of_split[MEAN]
        # random halves without replacement spread as much as bootstrap samples of all cells
        is_clear = np.abs(_mean(gap)) > 1.96 * gap.std(0)
        base, ceiling = _mean(of_split[MEAN]), _mean(of_split[REPLICATE])
        is_better = ceiling < base if metric in metrics.LOWER_IS_BETTER else ceiling > base
        for name, values in of_split.items():
            mean = _mean(values)
            with np.errstate(invalid="ignore", divide="ignore"):
                scaled = np.where(is_clear & is_better, (mean - base) / (ceiling - base), np.nan)
            parts.append(
                pd.DataFrame(
                    {
                        "perturbation": [screen.names[p] for p in asked],
                        "method": name,
                        "metric": metric,
                        "score": mean,
                        "scaled": scaled,
                        "n_cells": n_cells,
                        "has_genes": has_genes,
                    }
                )
            )
    table = pd.concat(parts, ignore_index=True)
    return Scores(table, _summary(table, random_state))


def _mean(values: FloatArray) -> FloatArray:
    """Average over splits in which the score is defined."""
    n = np.isfinite(values).sum(0)
    return np.divide(np.nansum(values, 0), n, out=np.full(values.shape[1], np.nan), where=n > 0)


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Average over perturbations: all of them, and those whose genes are measured; perturbations are resampled."""
    rows = []
    for among in ("all", "measured") if not table["has_genes"].all() else ("all",):
        part = table if among == "all" else table[table["has_genes"]]
        for metric, scores in part.groupby("metric", sort=False):
            wide = scores.pivot(index="perturbation", columns="method", values="score")
            each = scores.pivot(index="perturbation", columns="method", values="scaled")
            for method in scores["method"].unique():
                low, high = _interval(wide[method].to_numpy(), seed)
                is_scored = wide[method].notna()
                rows.append(
                    {
                        "among": among,
                        "method": method,
                        "metric": metric,
                        "score": wide[method].mean(),
                        "low": low,
                        "high": high,
                        "scaled": _scaled(wide, each, method, metric in metrics.LOWER_IS_BETTER, seed),
                        "n": int(is_scored.sum()),
                        "n_unscaled": int((is_scored & each[method].isna()).sum()),
                    }
                )
    return pd.DataFrame(rows)


def _scaled(wide: pd.DataFrame, each: pd.DataFrame, method: str, is_lower_better: bool, seed: int) -> float:
    """Scale a mean score by the mean baseline and the replicate on the same perturbations, if these clearly differ."""
    scores = wide[[method, MEAN, REPLICATE]].set_axis(["method", "mean", "replicate"], axis=1).dropna()
    if len(scores) < 2:
        return float(each.loc[scores.index, method].mean()) if len(scores) else float("nan")
    gap = scores["replicate"] - scores["mean"]
    low, high = _interval(gap.to_numpy(), seed)
    if not (high < 0 if is_lower_better else low > 0):
        return float("nan")
    return float((scores["method"] - scores["mean"]).mean() / gap.mean())


def _interval(values: FloatArray, seed: int) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of perturbations."""
    draws = np.random.default_rng(seed).integers(0, len(values), (_N_RESAMPLES, len(values)))
    means = _resampled(values, draws)
    means = means[np.isfinite(means)]
    low, high = np.quantile(means, (0.025, 0.975)) if len(means) else (np.nan, np.nan)
    return float(low), float(high)


def _resampled(values: FloatArray, draws: IntArray) -> FloatArray:
    drawn = values[draws]
    n = np.isfinite(drawn).sum(1)
    return np.divide(np.nansum(drawn, 1), n, out=np.full(len(draws), np.nan), where=n > 0)


def abstention(table: pd.DataFrame, confidence: pd.Series, method: str) -> pd.DataFrame:
    """Return the mean score of a method over its most confident predictions, for each number of them."""
    order = confidence.dropna().sort_values(ascending=False, kind="stable")
    rows = []
    for metric, scores in table[table["method"] == method].groupby("metric", sort=False):
        of = scores.set_index("perturbation")["score"]
        for n in range(1, len(order) + 1):
            kept = of.reindex(order.index[:n])
            rows.append({"metric": metric, "min_confidence": order.iloc[n - 1], "n_kept": n, "score": kept.mean()})
    return pd.DataFrame(rows)
