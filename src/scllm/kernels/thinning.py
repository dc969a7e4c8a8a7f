"""Count downsampling (binomial thinning), with random draws that depend only on each cell's key."""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from scllm.kernels._jit import row_kernel
from scllm.kernels.draws import draw, uniform_entries
from scllm.kernels.ragged import restrict

__all__ = ["thin", "thin_to"]

_SHARE, _COUNT = np.uint64(3), np.uint64(4)  # salts that no other draw uses
_STEP = np.uint64(0x9E3779B97F4A7C15)
_WHOLE = 32  # counts are downsampled in pieces of this size, for which (1 - p)^n cannot underflow


def thin(
    indptr: NDArray[np.integer], ids: NDArray[np.integer], counts: NDArray, keys: NDArray[np.int64], most: float
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray]:
    """Downsample the counts of each cell, as if it had been sequenced less deeply.

    For each cell, the fraction to remove is drawn uniformly from 0 to ``most``. Each molecule is kept with the same
    probability, so a count ``n`` becomes Binomial(n, 1 - fraction).

    Parameters
    ----------
    indptr, ids, counts
        Ragged rows: gene ids and counts. Counts that are not integers (ambient-corrected, denoised) are rounded.
    keys
        One key per row, from :func:`scllm.kernels.draws.mix`.
    most
        Largest fraction of counts to remove, from 0 to below 1.

    Returns
    -------
    ``indptr``, ``ids`` and ``counts`` of the remaining counts, without zeros.
    """
    shares = uniform_entries(np.arange(len(keys) + 1), np.zeros(len(keys), np.int64), keys, int(_SHARE))
    return _kept(indptr, ids, counts, keys, 1 - most * shares)


def thin_to(
    indptr: NDArray[np.integer],
    ids: NDArray[np.integer],
    counts: NDArray,
    keys: NDArray[np.int64],
    totals: NDArray[np.floating],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray]:
    """Downsample the counts of each cell to about a given total; cells with a lower one stay as they are.

    Parameters
    ----------
    indptr, ids, counts, keys
        As in :func:`thin`.
    totals
        Expected sum of the counts of each row.

    Returns
    -------
    As in :func:`thin`.
    """
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    sums = np.bincount(row, weights=counts, minlength=len(indptr) - 1)
    return _kept(indptr, ids, counts, keys, np.minimum(totals / np.maximum(sums, 1e-12), 1.0))


def _kept(
    indptr: NDArray[np.integer], ids: NDArray[np.integer], counts: NDArray, keys: NDArray[np.int64], p: NDArray
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray]:
    """Keep each molecule of a row with its probability ``p``."""
    kept = np.empty_like(counts)
    _thin(indptr, ids, counts, keys.view(np.uint64), np.asarray(p, np.float64), kept)
    return restrict(indptr, ids, kept, np.arange(int(ids.max(initial=0)) + 1))


@row_kernel
def _thin(indptr, ids, counts, keys, probability, kept):
    for row in prange(indptr.size - 1):
        p = probability[row]
        for j in range(indptr[row], indptr[row + 1]):
            left, n, piece = np.int64(np.rint(counts[j])), 0, np.uint64(ids[j])
            while left > 0:
                size = min(left, _WHOLE)
                # inversion: walk up the binomial distribution until it passes the draw
                u, k = draw(keys[row], _COUNT, piece), 0
                chance = (1.0 - p) ** size
                total = chance
                if p == 1.0:  # nothing is removed, and the ratio below would be infinite
                    k = size
                while u >= total and k < size:
                    chance *= (size - k) / (k + 1) * p / (1.0 - p)
                    k += 1
                    total += chance
                n += k
                left -= size
                piece += _STEP
            kept[j] = n
