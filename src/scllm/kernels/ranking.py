"""Order each row's entries by decreasing key.

The bits of a non-negative float32 increase with its value, so rows are sorted by the distance of the bits from the
highest of the row. Its leading bits and the position are packed into 32 bits and sorted by radix, in two stable passes
without comparisons, which would be mispredicted. Insertion sort then orders the few neighbours with equal leading bits.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from scllm.kernels._jit import jit, row_kernel

__all__ = ["rank_rows", "scaled", "top_rows"]

_DIGIT_BITS = 11
_BLOCK = 128  # rows that share scratch memory
_VALUE = np.uint32(0x7FFFFFFF)  # without the sign, which a zero may have


def top_rows(
    indptr: NDArray[np.integer], keys: NDArray[np.floating], entries: NDArray, most: int
) -> tuple[NDArray[np.int64], NDArray]:
    """Gather at most ``most`` entries of each row by decreasing key.

    Parameters
    ----------
    indptr
        Where each row begins and ends, from 0 on.
    keys
        What to order by, sorted as float32; not negative, none of them NaN. Of equal keys the earlier comes first.
    entries
        Entries to gather, one per key.
    most
        Largest number of entries per row.

    Returns
    -------
    The new ``indptr`` and the entries, in their own type.
    """
    new_indptr = np.zeros(indptr.size, np.int64)
    np.cumsum(np.minimum(np.diff(indptr), most), out=new_indptr[1:])
    out = np.empty(new_indptr[-1], entries.dtype)
    _top_rows(indptr, _as_bits(keys), entries, new_indptr, out)
    return new_indptr, out


def rank_rows(indptr: NDArray[np.integer], keys: NDArray[np.floating]) -> NDArray[np.int32]:
    """Rank each row's entries by decreasing key, starting at 1.

    Parameters
    ----------
    indptr
        Where each row begins and ends, from 0 on.
    keys
        What to rank by, as for :func:`top_rows`.

    Returns
    -------
    Rank of each entry in its row, int32 ``(n_entries,)``.
    """
    out = np.empty(keys.size, np.int32)
    _rank_rows(indptr, _as_bits(keys), out)
    return out


def scaled(values: NDArray, ids: NDArray[np.integer], scale: NDArray[np.floating]) -> NDArray[np.float32]:
    """Divide each value by the scale of its id.

    Parameters
    ----------
    values
        ``(n_entries,)``.
    ids
        Id of each value.
    scale
        Scale of each id. Division is in double precision, so that equal quotients stay equal.

    Returns
    -------
    float32 ``(n_entries,)``, NaN where the scale is NaN.
    """
    out = np.empty(values.size, np.float32)
    _scaled(values, ids, np.asarray(scale, np.float64), out)
    return out


def _as_bits(keys: NDArray[np.floating]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(keys, np.float32).view(np.uint32)


@jit
def _scaled(values, ids, scale, out):
    for j in range(values.size):
        out[j] = values[j] / scale[np.uint64(ids[j])]  # unsigned, so numba does not check for negative positions


@row_kernel
def _top_rows(indptr, bits, entries, new_indptr, out):
    n_rows = indptr.size - 1
    for block in prange((n_rows + _BLOCK - 1) // _BLOCK):
        first, last = block * _BLOCK, min((block + 1) * _BLOCK, n_rows)
        pairs, tally = _scratch(indptr, first, last)
        for row in range(first, last):
            begin, end = indptr[row], indptr[row + 1]
            of_row, top = entries[begin:end], out[new_indptr[row] : new_indptr[row + 1]]
            position = _sort_row(bits[begin:end], pairs, tally)
            for j in range(top.size):
                top[j] = of_row[pairs[0, j] & position]


@row_kernel
def _rank_rows(indptr, bits, out):
    n_rows = indptr.size - 1
    for block in prange((n_rows + _BLOCK - 1) // _BLOCK):
        first, last = block * _BLOCK, min((block + 1) * _BLOCK, n_rows)
        pairs, tally = _scratch(indptr, first, last)
        for row in range(first, last):
            begin, end = indptr[row], indptr[row + 1]
            of_row = out[begin:end]
            position = _sort_row(bits[begin:end], pairs, tally)
            for j in range(end - begin):
                of_row[pairs[0, j] & position] = j + 1


@jit
def _scratch(indptr, first, last):
    """Allocate memory for the longest row: two buffers of pairs, and two tallies."""
    longest = 0
    for row in range(first, last):
        longest = max(longest, indptr[row + 1] - indptr[row])
    return np.empty((2, longest), np.uint32), np.empty((2, 1 << _DIGIT_BITS), np.uint32)


@jit
def _n_bits(number):
    n = 0
    while number >> n:
        n += 1
    return n


@jit
def _sort_row(bits, pairs, tally):
    """Sort a row; the positions are in ``pairs[0]``, in the bits of the returned mask."""
    n = bits.size
    lowest, highest = _VALUE, np.uint32(0)
    for j in range(n):
        lowest, highest = min(lowest, bits[j] & _VALUE), max(highest, bits[j] & _VALUE)
    n_bits, n_position = _n_bits(highest - lowest) if n else 0, _n_bits(max(1, n) - 1)
    # as many leading bits as fit, but no more than are needed to distinguish keys in a row of this length
    n_dropped = max(0, n_bits - min(32 - n_position, 2 * max(4, n_position), 2 * _DIGIT_BITS))
    # digits no wider than the keys of this row need, because the tallies of wider digits cost time
    width = np.uint32((n_bits - n_dropped + 1) // 2)
    shift, dropped = np.uint32(n_position), np.uint32(n_dropped)
    mask, position = (np.uint32(1) << width) - np.uint32(1), (np.uint32(1) << shift) - np.uint32(1)
    lower, upper = tally[0, : np.int64(mask) + 1], tally[1, : np.int64(mask) + 1]
    lower[:], upper[:] = 0, 0
    for j in range(n):
        pair = (highest - (bits[j] & _VALUE)) >> dropped << shift | np.uint32(j)
        pairs[0, j] = pair
        lower[pair >> shift & mask] += np.uint32(1)
        upper[pair >> shift >> width] += np.uint32(1)
    _scatter(pairs[0], pairs[1], n, shift, mask, lower)
    _scatter(pairs[1], pairs[0], n, shift + width, mask, upper)
    if n_dropped and not _insert(bits, pairs[0], position):
        _sort_by_comparing(bits, pairs[0])
        return ~np.uint32(0)
    return position


@jit
def _scatter(source, target, n, shift, mask, tally):
    """Move pairs to the place of their digit, keeping their order."""
    total = np.uint32(0)
    for digit in range(tally.size):
        tally[digit], total = total, total + tally[digit]
    for j in range(n):
        pair = source[j]
        digit = pair >> shift & mask
        target[tally[digit]] = pair
        tally[digit] += np.uint32(1)


@jit
def _insert(bits, pairs, position):
    """Sort by insertion; return False if there are too many moves."""
    n_moves = 4 * bits.size
    last = bits[pairs[0] & position] & _VALUE
    for j in range(1, bits.size):
        pair = pairs[j]
        key = bits[pair & position] & _VALUE
        if key <= last:
            last = key
            continue
        i = j
        while i and (bits[pairs[i - 1] & position] & _VALUE) < key:
            pairs[i] = pairs[i - 1]
            i -= 1
        pairs[i] = pair
        n_moves -= j - i
        if n_moves < 0:
            return False
    return True


@jit
def _sort_by_comparing(bits, positions):
    """Sort a row by comparisons, if its keys are crowded in a small part of their range."""
    whole = np.empty(bits.size, np.uint64)
    for j in range(bits.size):
        whole[j] = np.uint64(_VALUE - (bits[j] & _VALUE)) << np.uint64(32) | np.uint64(j)
    whole.sort()
    for j in range(bits.size):
        positions[j] = np.uint32(whole[j] & np.uint64(0xFFFFFFFF))
