"""Scores of predicted expression of the spots of one section, ``(n_spots, n_genes)``, one score per gene or pair."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from scllm._typing import FloatArray

__all__ = [
    "correlation_error",
    "gene_correlations",
    "is_constant",
    "pearson",
    "spearman",
    "structural_similarity",
    "variance_ratio",
]

# constants of structural similarity, as shares of the range of values (Wang et al. 2004)
_K1, _K2 = 0.01, 0.03
_NOISE = 1e-6  # range of values, relative to their size, that is only rounding in float32


def pearson(truth: FloatArray, predicted: FloatArray) -> FloatArray:
    """Compute Pearson's correlation of each gene over spots, ``(n_genes,)``.

    A gene that is predicted as constant has correlation 0; one that is constant in truth has none (NaN).
    """
    t, p = _centred(truth), _centred(predicted)
    of_truth, of_predicted = np.sqrt((t**2).sum(0)), np.sqrt((p**2).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (t * p).sum(0) / (of_truth * of_predicted)
    found = np.where(is_constant(predicted), 0.0, found)
    return np.where(is_constant(truth), np.nan, found)


def spearman(truth: FloatArray, predicted: FloatArray) -> FloatArray:
    """Compute Spearman's rank correlation of each gene over spots, ``(n_genes,)``; see :func:`pearson`."""
    # ranks of rounding errors would vary
    found = np.where(is_constant(predicted), 0.0, pearson(rankdata(truth, axis=0), rankdata(predicted, axis=0)))
    return np.where(is_constant(truth), np.nan, found)


def structural_similarity(truth: FloatArray, predicted: FloatArray) -> FloatArray:
    """Compute the structural similarity of each gene, over the whole section as one window, ``(n_genes,)``.

    Both are divided by their maximum first, as in the benchmark of Li et al., *Nature Methods* 2022,
    doi:10.1038/s41592-022-01480-9. The index is that of Wang et al., *IEEE Trans. Image Process.* 2004.
    """
    t, p = (_scaled(np.asarray(values, np.float64)) for values in (truth, predicted))
    mean_t, mean_p = t.mean(0), p.mean(0)
    covariance = ((t - mean_t) * (p - mean_p)).mean(0)
    light = (2 * mean_t * mean_p + _K1**2) / (mean_t**2 + mean_p**2 + _K1**2)
    structure = (2 * covariance + _K2**2) / (t.var(0) + p.var(0) + _K2**2)
    return np.where(is_constant(truth), np.nan, light * structure)


def variance_ratio(truth: FloatArray, predicted: FloatArray) -> FloatArray:
    """Compute the variance of predicted values divided by that of true ones, ``(n_genes,)``; 1 is best."""
    of_truth = np.asarray(truth, np.float64).var(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(is_constant(truth), np.nan, np.asarray(predicted, np.float64).var(0) / of_truth)


def gene_correlations(values: FloatArray) -> FloatArray:
    """Compute the correlation of each pair of genes over spots, ``(n_genes, n_genes)``; 0 for constant genes."""
    centred = _centred(values)
    norm = np.sqrt((centred**2).sum(0))
    unit = np.divide(centred, norm, out=np.zeros_like(centred), where=~is_constant(values))
    return unit.T @ unit


def correlation_error(truth: FloatArray, predicted: FloatArray) -> float:
    """Compute the root mean square error of gene-gene correlations, over pairs of genes that vary in both.

    Genes that are predicted as constant have no correlation with others. Taken as 0, which is near that of most pairs,
    they would make a prediction of the mean profile look better than any other. NaN with fewer than two genes.
    """
    there = ~is_constant(truth) & ~is_constant(predicted)
    if there.sum() < 2:
        return float("nan")
    difference = gene_correlations(predicted[:, there]) - gene_correlations(truth[:, there])
    off = ~np.eye(len(difference), dtype=bool)
    return float(np.sqrt((difference[off] ** 2).mean()))


def is_constant(values: FloatArray) -> np.ndarray:
    """Return which genes do not vary over spots but for rounding, ``(n_genes,)``."""
    return np.ptp(values, axis=0) <= _NOISE * np.abs(values).max(axis=0)


def _centred(values: FloatArray) -> FloatArray:
    values = np.asarray(values, np.float64)
    return values - values.mean(0)


def _scaled(values: FloatArray) -> FloatArray:
    highest = np.abs(values).max(0)
    return values / np.where(highest > 0, highest, 1)
