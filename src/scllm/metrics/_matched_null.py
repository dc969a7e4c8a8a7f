"""Tests against an empirical null: the same statistic of other genes with a similar expression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

from scllm._typing import FloatArray, IntArray

__all__ = ["FEWEST_NULLS", "matched_null_test", "p_values", "standardised"]

FEWEST_NULLS = 10
"""Fewest null statistics from which a location and a scale are estimated."""

_DEGREES = np.array([1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0, 100.0])
# where all entries may be nulls, those with real effects are in the tails, which must not widen the null; without the
# tails, degrees of freedom below 2 cannot be told from 2
_CENTRAL, _FEWEST_DEGREES = 0.95, 2.0
# numbers of which tails are fitted; more of them only take time
_MOST_FITTED = 4000
# mean and standard deviation of log |x| of a standard normal x
_LOG_ABSOLUTE, _LOG_SPREAD = -0.635, 1.11


def matched_null_test(
    statistic: FloatArray,
    level: FloatArray,
    is_null: NDArray[np.bool_] | None = None,
    *,
    n_matched: int | None = None,
    alternative: str = "two-sided",
    kinds: Sequence[object] | None = None,
) -> pd.DataFrame:
    """Test each statistic against those of the null entries whose level is nearest.

    Location and scale are local straight lines through the ``n_matched`` nearest null entries without the entry itself,
    for the scale through the logarithm of their absolute deviation, so that they follow a trend with the level.
    Outliers weigh little (as in Cleveland's lowess, 1979, doi:10.2307/2286407). The standardised null entries may have
    heavier tails than a normal distribution, and other tails above than below: t distributions of many degrees of
    freedom and scales are fitted to each side, and the p-value is their mean, weighted by their likelihood (an
    empirical null as Efron's, 2004, doi:10.1198/016214504000000089, that allows for the error of the fit). Without
    separate nulls, only the central 95 % are fitted, which costs power where tails are heavy. The p-values are adjusted
    by the method of Benjamini and Hochberg.

    Parameters
    ----------
    statistic
        One number per entry, ``(n,)``; NaN is left out.
    level
        Expression by which entries are matched, ``(n,)``.
    is_null
        Which entries are nulls; ``None``: all of them, if most entries are assumed to have no effect.
    n_matched
        Number of null entries that each entry is compared with. ``None``: a third of them, but at least 30 and at most
        200.
    alternative
        ``"two-sided"`` or ``"greater"``.
    kinds
        Entries are compared with null entries of the same kind only (such as the number of genes).

    Returns
    -------
    ``null_median``, ``null_scale``, ``z``, ``p_value`` and ``q_value`` of each entry, NaN where fewer than ten null
    entries can be compared. ``q_value`` is adjusted over the entries that are no nulls, or over all if all are nulls.
    """
    statistic, level = np.asarray(statistic, float), np.asarray(level, float)
    null = np.ones(len(statistic), bool) if is_null is None else np.asarray(is_null, bool)
    kind = pd.factorize(pd.Series(["one"] * len(statistic) if kinds is None else list(kinds)))[0]
    found = pd.DataFrame(np.nan, index=range(len(statistic)), columns=["null_median", "null_scale", "z", "p_value"])
    for one in np.unique(kind):
        of_kind = np.flatnonzero((kind == one) & np.isfinite(statistic))
        pool = of_kind[null[of_kind]]
        if len(pool) >= FEWEST_NULLS + 1:
            n = int(np.clip(len(pool) // 3, 30, 200)) if n_matched is None else n_matched
            found.loc[of_kind] = _tested(statistic, level, of_kind, pool, n, alternative)
    found["q_value"] = np.nan
    asked = found["p_value"].notna() & (~null if (~null).any() else True)
    if asked.any():
        found.loc[asked, "q_value"] = stats.false_discovery_control(found.loc[asked, "p_value"])
    return found


def _tested(
    statistic: FloatArray, level: FloatArray, entries: IntArray, pool: IntArray, n_matched: int, alternative: str
) -> FloatArray:
    """Return location, scale, z and p of some entries, compared with the nearest of ``pool``."""
    location, scale, z = standardised(statistic, level, entries, pool, n_matched)
    p = p_values(z, z[np.isin(entries, pool)], are_pure=len(pool) < len(entries), alternative=alternative)
    return np.column_stack([location, scale, z, p])


def standardised(
    statistic: FloatArray, level: FloatArray, entries: IntArray, pool: IntArray, n_matched: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return location and scale from the nearest entries of ``pool``, and the standardised statistic, of some entries.

    Scale is that of a normal distribution. Locations of the pool are found in turn with the weights of its outliers.
    """
    pool = pool[np.argsort(level[pool], kind="stable")]
    of_pool = statistic[pool]
    line = _Lines.of(level, pool, pool, n_matched)
    location = np.median(of_pool[line.near], axis=1)
    weight = np.ones(len(pool))
    for _ in range(3):
        deviation = _log_deviation(of_pool - location)
        scale = np.exp(line.fitted(deviation) - _LOG_ABSOLUTE)
        weight = np.clip(1 - ((of_pool - location) / (6 * scale)) ** 2, 0, None) ** 2 + 1e-6
        location = line.fitted(of_pool, weight)
    asked = _Lines.of(level, entries, pool, n_matched)
    location, deviation = asked.fitted(of_pool, weight), _log_deviation(of_pool - location)
    # lines are less certain at the ends: the scale is that of a prediction, plus its standard error
    log_scale = asked.fitted(deviation) - _LOG_ABSOLUTE + _LOG_SPREAD * np.sqrt(asked.leverage())
    scale = np.exp(log_scale) * np.sqrt(1 + asked.leverage(weight))
    return location, scale, (statistic[entries] - location) / scale


def _log_deviation(deviation: FloatArray) -> FloatArray:
    """Logarithm of absolute deviations; those of ties are not below a hundredth of the median."""
    size = np.abs(deviation)
    lowest = max(1e-2 * float(np.median(size)), 1e-6 * float(size.mean()), np.finfo(float).tiny)
    return np.log(np.maximum(size, lowest))


@dataclass(frozen=True)
class _Lines:
    """Straight lines through the entries of a pool that are nearest to each of some entries.

    Parameters
    ----------
    near
        Positions in the pool of the nearest entries, ``(n, k)``.
    distance, weight
        Difference of their levels, and the weight that falls with it, ``(n, k)``.
    """

    near: IntArray
    distance: FloatArray
    weight: FloatArray

    @classmethod
    def of(cls, level: FloatArray, entries: IntArray, pool: IntArray, n: int) -> _Lines:
        """Find the nearest entries of ``pool`` (ascending by level) without each entry itself."""
        near = _nearest(level, entries, pool, n)
        distance = level[pool][near] - level[entries][:, None]
        farthest = np.abs(distance).max(axis=1, keepdims=True)
        share = np.abs(distance) / np.where(farthest > 0, 1.0001 * farthest, 1)
        return cls(near, distance, (1 - share**3) ** 3 + 1e-6)

    def fitted(self, values: FloatArray, weight: FloatArray | None = None) -> FloatArray:
        """Return the value of each line at its entry, for values of the pool."""
        return (self._shares(weight) * values[self.near]).sum(1)

    def leverage(self, weight: FloatArray | None = None) -> FloatArray:
        """Return the variance of the value of each line, as a share of that of one entry of the pool."""
        return (self._shares(weight) ** 2).sum(1)

    def _shares(self, weight: FloatArray | None) -> FloatArray:
        """Return how much each near entry adds to the value of a line, ``(n, k)``."""
        d, w = self.distance, self.weight if weight is None else self.weight * weight[self.near]
        total, first, second = (one.sum(1, keepdims=True) for one in (w, w * d, w * d * d))
        determinant = total * second - first**2
        has_slope = determinant > 1e-9 * total * second
        return w * np.where(has_slope, (second - first * d) / np.where(has_slope, determinant, 1), 1 / total)


def _nearest(level: FloatArray, entries: IntArray, pool: IntArray, n: int) -> IntArray:
    """Return positions in ``pool`` (ascending by level) of the ``n`` entries around each entry, without itself."""
    place = np.searchsorted(level[pool], level[entries])
    own = np.full(len(entries), len(pool))
    of_entry = {entry: i for i, entry in enumerate(pool.tolist())}
    is_in = np.isin(entries, pool)
    own[is_in] = [of_entry[entry] for entry in entries[is_in].tolist()]
    place = np.where(is_in, own, place)
    n = min(n, len(pool) - 1)
    start = np.clip(place - n // 2, 0, len(pool) - 1 - n)
    near = start[:, None] + np.arange(n)
    return near + (near >= own[:, None])


def p_values(z: FloatArray, null: FloatArray, *, are_pure: bool, alternative: str = "two-sided") -> FloatArray:
    """Return p-values of standardised statistics from those of nulls; each side has tails of its own.

    Unless nulls ``are_pure``, those farthest from zero may have real effects, and only the others are fitted.
    """
    p = np.ones(len(z))
    for sign in (1, -1):
        side, of_null = sign * z > 0, sign * null[sign * null > 0]
        share = (len(of_null) + 1) / (len(null) + 2)
        if side.any() and len(of_null) > 1:
            p[side] = share * _tail(sign * z[side], of_null, are_pure)
    if alternative == "two-sided":
        return np.minimum(2 * p, 1)
    return np.where(z > 0, p, 1 - p)


def _tail(z: FloatArray, null: FloatArray, are_pure: bool) -> FloatArray:
    """Return how often a positive null exceeds ``z > 0``: mean over t distributions, weighted by their likelihood."""
    limit = np.inf if are_pure else float(np.quantile(null, _CENTRAL))
    all_degrees = _DEGREES if are_pure else _DEGREES[_DEGREES >= _FEWEST_DEGREES]
    fitted = np.sort(null[null <= limit])
    middle = max(float(np.median(null)), np.finfo(float).tiny)
    if len(fitted) > _MOST_FITTED:
        fitted = fitted[np.linspace(0, len(fitted) - 1, _MOST_FITTED).astype(int)]
    scales = middle * np.geomspace(0.3, 4.0, 30)
    table = np.empty((len(all_degrees), len(scales)))
    for i, degrees in enumerate(all_degrees):
        within = 1 - 2 * special.stdtr(degrees, -limit / scales)
        shape = (degrees + 1) / 2 * np.log1p((fitted[:, None] / scales) ** 2 / degrees).sum(0)
        # the constant of the density of t
        constant = special.gammaln((degrees + 1) / 2) - special.gammaln(degrees / 2) - np.log(degrees) / 2
        table[i] = len(fitted) * (constant - np.log(scales * within)) - shape
    weight = np.exp(table - table.max())
    likely = np.argwhere(weight > 1e-5 * weight.sum())
    # the tail is smooth, and is read off a grid
    grid = np.concatenate([[0.0], np.geomspace(1e-2 * middle, max(float(z.max()), middle) * 1.01, 100)])
    tail = sum(weight[i, j] * 2 * special.stdtr(all_degrees[i], -grid / scales[j]) for i, j in likely)
    tail = tail / sum(weight[i, j] for i, j in likely)
    return np.exp(np.interp(z, grid, np.log(np.maximum(tail, np.finfo(float).tiny))))
