"""Order of each row's entries by falling key."""

from __future__ import annotations

import numpy as np

from scllm._typing import FloatArray, IntArray

__all__ = ["order_rows"]


def order_rows(indptr: IntArray, keys: FloatArray) -> IntArray:
    """Positions of each row's entries, highest key first, equal keys in the order they stand, ``(n,)``.

    Parameters
    ----------
    indptr
        Where each row begins, ``(n_rows + 1,)``.
    keys
        ``(n,)``, none of them NaN.
    """
    row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    return np.lexsort((-keys, row))
