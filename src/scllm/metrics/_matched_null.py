"""Tests against an empirical null: the same statistic of other genes with a similar expression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from scllm._typing import FloatArray, IntArray

__all__ = ["FEWEST_NULLS", "fitted_t", "matched_null_test", "standardised"]

FEWEST_NULLS = 10
"""Fewest null statistics from which a location and a scale are estimated."""

_DEGREES = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
# where all entries may be nulls, those with real effects are in the tails, which must not widen the null
_CENTRAL = 0.95


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

    Location and scale are the median and the scaled median absolute deviation of the ``n_matched`` nearest null
    entries, without the entry itself. The standardised null entries may have heavier tails than a normal distribution:
    the tails of a t distribution that is fitted to them give the p-values (Efron's empirical null, 2004,
    doi:10.1198/016214504000000089). Without separate nulls, only the central 95 % are fitted. The p-values are adjusted
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
        Number of null entries that each entry is compared with. ``None``: a tenth of them, but at least 15 and at most
        50.
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
            n = int(np.clip(len(pool) // 10, 15, 50)) if n_matched is None else n_matched
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
    is_pure = len(pool) < len(entries)
    degrees, spread = fitted_t(z[np.isin(entries, pool)], 1.0 if is_pure else _CENTRAL)
    tail = stats.t.sf(np.abs(z) / spread, degrees)
    p = 2 * tail if alternative == "two-sided" else np.where(z > 0, tail, 1 - tail)
    return np.column_stack([location, scale, z, np.clip(p, 0, 1)])


def standardised(
    statistic: FloatArray, level: FloatArray, entries: IntArray, pool: IntArray, n_matched: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return median and scale of the nearest entries of ``pool``, and the standardised statistic, of some entries."""
    pool = pool[np.argsort(level[pool], kind="stable")]
    values = statistic[pool][_nearest(level, entries, pool, n_matched)]
    location = np.median(values, axis=1)
    scale = 1.4826 * np.median(np.abs(values - location[:, None]), axis=1)
    scale = np.where(scale > 0, scale, values.std(axis=1, ddof=1))
    smallest = max(float(np.median(scale)) * 1e-6, np.finfo(float).tiny)
    return location, scale, (statistic[entries] - location) / np.maximum(scale, smallest)


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


def fitted_t(z: FloatArray, central: float) -> tuple[float, float]:
    """Fit degrees of freedom and scale of a t distribution around zero to the ``central`` share by likelihood."""
    limit = float(np.quantile(np.abs(z), central))
    z = z[np.abs(z) <= limit]
    scales = max(float(np.median(np.abs(z))), 1e-12) * np.geomspace(0.5, 3.0, 60)
    table = np.empty((len(_DEGREES), len(scales)))
    for i, degrees in enumerate(_DEGREES):
        within = 1.0 if central == 1 else 1 - 2 * stats.t.sf(limit / scales, degrees)
        table[i] = stats.t.logpdf(z[:, None] / scales, degrees).sum(0) - len(z) * np.log(scales * within)
    row, column = np.unravel_index(int(table.argmax()), table.shape)
    return _DEGREES[row], float(scales[column])
