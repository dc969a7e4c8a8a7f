"""Directed, signed edges from effects of deletions, and scores of networks against reference edges."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from scllm._typing import FloatArray
from scllm.metrics._matched_null import FEWEST_NULLS, p_values, standardised

__all__ = ["directed_edges", "edge_scores"]


def directed_edges(effect: FloatArray, level: FloatArray, *, fdr: float = 0.05, n_matched: int = 50) -> pd.DataFrame:
    """Find directed and signed edges in the effects of deletions.

    Some targets respond to any deletion, and some deletions change all genes. So effects are first scaled by those on
    the same target and those of the same source (an edge stands out among both, as in CLR of Faith et al. 2007,
    doi:10.1371/journal.pbio.0050008). Then the effect of deleting gene ``a`` on gene ``b`` is compared with the effects
    on ``b`` of deleting genes of similar expression, as :func:`matched_null_test` does without separate nulls. The
    p-values are adjusted by Benjamini and Hochberg over all pairs. Most pairs must be unrelated: a source that acts on
    more than half of the genes, or of which more than half of the effects are equal, is left without edges.

    Parameters
    ----------
    effect
        Mean change of each gene (columns) after the deletion of each gene (rows), ``(m, m)``; NaN if not known.
    level
        Expression of each gene, ``(m,)``.
    fdr
        False discovery rate.
    n_matched
        Number of genes of similar expression that a gene is compared with.

    Returns
    -------
    One row for each pair: ``source``, ``target`` (positions), ``effect``, ``z``, ``p_value``, ``q_value``,
    ``reverse_z`` (of the effect of the target on the source), ``sign`` (1: the source activates the target, because the
    target falls more than after other deletions; -1: it represses it), and ``is_edge``: significant, unless the other
    direction is too and has more than twice the ``z``.
    """
    m = len(effect)
    effect = np.where(np.eye(m, dtype=bool), np.nan, effect)
    alike, z = _centred(effect), np.full((m, m), np.nan)
    for target in range(m):
        known = np.flatnonzero(np.isfinite(effect[:, target]))
        if len(known) > FEWEST_NULLS:
            z[known, target] = standardised(alike[:, target], level, known, known, n_matched)[2]
    source, target = np.nonzero(np.isfinite(z))
    found = pd.DataFrame({"source": source, "target": target, "effect": effect[source, target]})
    found["z"] = z[source, target]
    found["p_value"], found["q_value"] = np.nan, np.nan
    if len(found):
        found["p_value"] = p_values(found["z"].to_numpy(), found["z"].to_numpy(), are_pure=False)
        found["q_value"] = stats.false_discovery_control(found["p_value"])
    found["reverse_z"] = z[target, source]
    q = np.ones((m, m))
    q[source, target] = found["q_value"]
    is_weaker = (q[target, source] < fdr) & (found["reverse_z"].abs() > 2 * found["z"].abs())
    found["sign"] = -np.sign(found["z"]).astype(int)
    found["is_edge"] = (found["q_value"] < fdr) & ~is_weaker
    return found


def _centred(effect: FloatArray) -> FloatArray:
    """Centre and scale each column and then each row of ``(m, m)`` by its median and median absolute deviation.

    Where that is zero, there is no spread to compare with, and all become zero.
    """
    for axis in (0, 1):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice")  # genes that no other gene is expressed with
            away = effect - np.nanmedian(effect, axis=axis, keepdims=True)
            scale = 1.4826 * np.nanmedian(np.abs(away), axis=axis, keepdims=True)
        effect = np.divide(away, scale, out=np.zeros_like(away), where=~(scale <= 0))
    return effect


def edge_scores(weight: FloatArray, is_edge: NDArray[np.bool_], among: NDArray[np.bool_]) -> dict[str, float]:
    """Score the strength of edges ``(m, m)`` against reference edges, over the pairs ``among``.

    Returns
    -------
    ``auroc``; ``auprc`` (average precision) and ``auprc_ratio``, divided by that of a random order;
    ``early_precision``, the share of reference edges among as many strongest edges, and ``early_precision_ratio``.
    Ties count as a random order.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth, strength = is_edge[among], np.nan_to_num(np.abs(weight[among]))
    n, share = int(truth.sum()), float(truth.mean()) if len(truth) else np.nan
    names = ("auroc", "auprc", "auprc_ratio", "early_precision", "early_precision_ratio")
    if n == 0 or n == len(truth):
        return dict.fromkeys(names, float("nan"))
    cut = np.sort(strength)[::-1][n - 1]
    above, tied = strength > cut, strength == cut
    hits = truth[above].sum() + truth[tied].mean() * (n - above.sum())
    precision = float(average_precision_score(truth, strength))
    early = float(hits / n)
    values = (float(roc_auc_score(truth, strength)), precision, precision / share, early, early / share)
    return dict(zip(names, values, strict=True))
