"""Quantile bins of each row.

The edges of a row are the quantiles of its non-zero values, bit for bit as ``numpy.quantile`` computes them, because a
value that is on an edge may get another bin than a value next to it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numba import prange
from numpy.typing import DTypeLike, NDArray

from scllm.kernels._bin_row import LEFT, MIDDLE, RANDOM, RIGHT, bin_row, edges_of_sorted, new_scratch
from scllm.kernels._jit import jit, row_kernel
from scllm.kernels._sorting import N_DIGITS, sort_row

__all__ = ["Ties", "bin_edges", "bin_rows"]

Ties = Literal["middle", "left", "right", "random"]

_TIES = {"middle": MIDDLE, "left": LEFT, "right": RIGHT, "random": RANDOM}
_BLOCK = 128  # rows that share scratch memory


def bin_rows(
    indptr: NDArray[np.integer],
    data: NDArray[np.generic],
    *,
    n_bins: int,
    ties: Ties = "middle",
    draws: NDArray[np.float64] | None = None,
    dtype: DTypeLike = np.uint8,
) -> NDArray[np.unsignedinteger]:
    """Sort each row's non-zero values into bins of equal size.

    There are ``n_bins - 1`` edges at evenly spaced quantiles of the row's non-zero values. For a value x, ``upto``
    edges are at most x and ``below`` edges are less than x. All bins from ``below + 1`` to ``upto`` are equally valid
    for x (a value that makes up half the row spans half the bins), and ``ties`` selects one. This is scGPT's binning
    (Cui et al. 2024), which draws the bin at random.

    Parameters
    ----------
    indptr
        Where each row begins and ends in ``data``.
    data
        Values of the rows, without NaN. Zeros, stored or not, get bin 0 and do not count for the quantiles.
    n_bins
        Number of bins, including the zero bin; from 2 to 65,536.
    ties
        Which of several valid bins a value gets: the ``"middle"`` one (rounded up), the lowest (``"left"``), the
        highest (``"right"``) or a ``"random"`` one, ``ceil(u * (below - upto) + upto)``.
    draws
        The u in [0, 1) of each entry of ``data``, for ``ties="random"``.
    dtype
        Type of the bins, wide enough for ``n_bins - 1``.

    Returns
    -------
    Bins (n_entries,), 0 for zeros and 1 to ``n_bins - 1`` for the rest.
    """
    _check(n_bins, ties, draws, data, np.dtype(dtype))
    data = _native(data)
    out = np.empty(data.size, dtype)
    draws = np.empty(0) if draws is None else draws
    _bin_rows(indptr, data, *_as_bits(data), _probabilities(n_bins), _TIES[ties], draws, out)
    return out


def bin_edges(indptr: NDArray[np.integer], data: NDArray[np.generic], *, n_bins: int) -> NDArray[np.float64]:
    """Compute the edges between each row's bins.

    Parameters
    ----------
    indptr
        Where each row begins and ends in ``data``.
    data
        Values of the rows, without NaN. Zeros do not count.
    n_bins
        Number of bins, including the zero bin.

    Returns
    -------
    Edges (n_rows, n_bins): 0, then the ``n_bins - 1`` quantiles. All 0 for a row without values.
    """
    _check(n_bins, "middle", None, data, np.dtype(np.uint16))
    data = _native(data)
    out = np.zeros((indptr.size - 1, n_bins), np.float64)
    _bin_edges(indptr, data, *_as_bits(data), _probabilities(n_bins), out)
    return out


def _check(n_bins, ties, draws, data, dtype) -> None:
    if ties not in _TIES:
        raise ValueError(f"Expected ties to be one of {', '.join(map(repr, _TIES))}, got {ties!r}. Pass one of these.")
    if not 2 <= n_bins <= 65_536:
        raise ValueError(f"Expected n_bins from 2 to 65,536, got {n_bins}. 51 is usual.")
    if dtype.kind not in "ui" or np.iinfo(dtype).max < n_bins - 1:
        raise ValueError(f"Expected a dtype that holds bins up to {n_bins - 1}, got {dtype}. Pass dtype=np.uint16.")
    if ties == "random" and (draws is None or draws.shape != data.shape):
        shape = None if draws is None else draws.shape
        raise ValueError(
            f"Expected draws of shape {data.shape}, one per stored value, with ties='random', got shape {shape}. Pass "
            "draws= or another ties=."
        )


def _native(data: NDArray[np.generic]) -> NDArray[np.generic]:
    """Convert values to one of the four types that the kernels are compiled for."""
    if data.dtype in (np.float32, np.float64, np.int32, np.int64):
        return np.ascontiguousarray(data)
    if data.dtype.kind in "bui":
        return data.astype(np.int32 if data.dtype.itemsize < 4 else np.int64)
    return data.astype(np.float32 if data.dtype == np.float16 else np.float64)


def _as_bits(data: NDArray[np.generic]) -> tuple[NDArray[np.unsignedinteger], bool]:
    """View values as unsigned integers for the radix sort, and return whether they are floats."""
    return data.view(f"u{data.dtype.itemsize}"), data.dtype.kind == "f"


def _probabilities(n_bins: int) -> NDArray[np.float64]:
    return np.linspace(0, 1, n_bins - 1)


@row_kernel
def _bin_rows(indptr, data, bits, is_float, q, ties, draws, out):
    n_rows = indptr.size - 1
    for block in prange((n_rows + _BLOCK - 1) // _BLOCK):
        first, last = block * _BLOCK, min((block + 1) * _BLOCK, n_rows)
        scratch = new_scratch(_longest(indptr, first, last), data, bits, q, out)
        for row in range(first, last):
            begin, end = indptr[row], indptr[row + 1]
            u = draws[begin:end] if ties == RANDOM else draws
            bin_row(data[begin:end], bits[begin:end], is_float, q, ties, u, scratch, out[begin:end])


@row_kernel
def _bin_edges(indptr, data, bits, is_float, q, out):
    n_rows = indptr.size - 1
    for block in prange((n_rows + _BLOCK - 1) // _BLOCK):
        first, last = block * _BLOCK, min((block + 1) * _BLOCK, n_rows)
        keys = np.empty((2, _longest(indptr, first, last)), bits.dtype)
        digits = np.empty(N_DIGITS, np.int64)
        for row in range(first, last):
            begin, end = indptr[row], indptr[row + 1]
            n = sort_row(data[begin:end], bits[begin:end], is_float, keys, digits)
            if n:
                edges_of_sorted(keys[0, :n].view(data.dtype), q, out[row, 1:])


@jit
def _longest(indptr, first, last):
    longest = 0
    for row in range(first, last):
        longest = max(longest, indptr[row + 1] - indptr[row])
    return longest
