"""Gather, restrict, order, crop and pad ragged rows.

Row ``i`` owns ``values[indptr[i]:indptr[i + 1]]``. Every returned ``indptr`` is int64 and begins at 0.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import NDArray

from scllm.kernels._jit import jit, row_kernel

__all__ = [
    "crop_random",
    "crop_top",
    "pad_rows",
    "prepend",
    "restrict",
    "restrict_in_order",
    "sum_repeats",
    "take_rows",
]

_BUCKETS = 1024

# multiplied by this, a word with one bit has another number in its six leading bits for each place of the bit
_DE_BRUIJN = 0x03F79D71B4CB0A89
_PLACE_OF_BIT = np.zeros(64, np.uint8)
_PLACE_OF_BIT[[(_DE_BRUIJN << place & (1 << 64) - 1) >> 58 for place in range(64)]] = np.arange(64)


def take_rows(indptr: NDArray[np.integer], rows: NDArray[np.integer], *arrays: NDArray) -> tuple[NDArray, ...]:
    """Gather rows from one or more parallel arrays.

    Parameters
    ----------
    indptr
        Where each row begins and ends.
    rows
        Positions of the rows, in any order, with or without repeats; not negative.
    arrays
        Parallel arrays that are divided by the same ``indptr``.

    Returns
    -------
    The new ``indptr``, then the gathered arrays in their original types.
    """
    rows = np.asarray(rows)
    # lengths of these rows only, so that the cost of a batch does not grow with the number of cells
    new_indptr = _indptr(indptr[rows + 1] - indptr[rows])
    outs = [np.empty(new_indptr[-1], array.dtype) for array in arrays]
    for array, out in zip(arrays, outs, strict=True):
        _take(new_indptr, indptr, rows, array, out)
    return new_indptr, *outs


def restrict(
    indptr: NDArray[np.integer], indices: NDArray[np.integer], data: NDArray, ids: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray]:
    """Keep the entries whose column has an id and whose value is not zero, and rename the columns to the ids.

    Parameters
    ----------
    indptr, indices, data
        A CSR matrix.
    ids
        Id of each column, -1 for columns to drop.

    Returns
    -------
    ``indptr``, ids (int32) and values of the remaining entries, in their original order.
    """
    n_entries = indptr[-1] - indptr[0]
    new_indptr = np.empty(indptr.size, np.int64)
    # one more than needed, because dropped entries are written too and overwritten by the next
    kept_ids, kept = np.empty(n_entries + 1, np.int32), np.empty(n_entries + 1, data.dtype)
    _restrict(indptr, indices, data, ids, new_indptr, kept_ids, kept)
    return new_indptr, kept_ids[: new_indptr[-1]], kept[: new_indptr[-1]]


def restrict_in_order(
    indptr: NDArray[np.integer],
    indices: NDArray[np.integer],
    data: NDArray,
    place: NDArray[np.integer],
    ids: NDArray[np.integer],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray]:
    """Keep the entries whose column has a place and whose value is not zero, and put each row in the order of places.

    Linear in the entries: a row is written into its places, which are then read from the first to the last.

    Parameters
    ----------
    indptr, indices, data
        A CSR matrix, no column twice in a row.
    place
        Place of each column, -1 for columns to leave out; no place twice.
    ids
        Id of each place.

    Returns
    -------
    ``indptr``, ids (int32) and values of what is left.
    """
    n_entries = indptr[-1] - indptr[0]
    new_indptr = np.zeros(indptr.size, np.int64)
    kept_ids, kept = np.empty(n_entries, np.int32), np.empty(n_entries, data.dtype)
    _restrict_in_order(indptr, indices, data, place, ids, new_indptr, kept_ids, kept)
    return new_indptr, kept_ids[: new_indptr[-1]], kept[: new_indptr[-1]]


def sum_repeats(
    indptr: NDArray[np.integer], ids: NDArray[np.integer], values: NDArray
) -> tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.float64]]:
    """Sum neighbouring entries of a row that share an id, in float64 and from the lowest to the highest.

    Parameters
    ----------
    indptr, ids, values
        Ragged rows in the order of their ids.

    Returns
    -------
    ``indptr``, ids and sums. They do not depend on the order in which the values of one id stood.
    """
    new_indptr = np.zeros(indptr.size, np.int64)
    kept_ids, sums = np.empty_like(ids), np.empty(values.size, np.float64)
    _sum_repeats(indptr, ids, values.astype(np.float64), new_indptr, kept_ids, sums)
    return new_indptr, kept_ids[: new_indptr[-1]], sums[: new_indptr[-1]]


def crop_top(indptr: NDArray[np.integer], values: NDArray, max_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find each row's highest values, to keep at most ``max_len`` of them.

    Parameters
    ----------
    indptr
        Where each row begins and ends.
    values
        What to choose by, without NaN. Of equal values the earlier is kept.
    max_len
        Largest number of entries per row.

    Returns
    -------
    The new ``indptr`` and the positions in ``values`` of the kept entries, in their original order.
    """
    lengths = np.diff(indptr)
    if lengths.size == 0 or lengths.max() <= max_len:
        return _indptr(lengths), np.arange(indptr[0], indptr[-1], dtype=np.int64)
    new_indptr = _indptr(np.minimum(lengths, max_len))
    positions = np.empty(new_indptr[-1], np.int64)
    _crop_top(indptr, values, values.dtype == np.uint8, new_indptr, positions)
    return new_indptr, positions


def crop_random(
    indptr: NDArray[np.integer], max_len: int, draws: NDArray[np.floating]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose a random subset of at most ``max_len`` entries of each row: those with the smallest draws.

    Parameters
    ----------
    indptr
        Where each row begins and ends.
    max_len
        Largest number of entries per row.
    draws
        One number per entry, as from :func:`scllm.kernels.draws.uniform_entries`.

    Returns
    -------
    The new ``indptr`` and the positions of the kept entries, in their original order.
    """
    return crop_top(indptr, -draws, max_len)


def prepend(indptr: NDArray[np.integer], values: NDArray, first: float) -> tuple[NDArray[np.int64], NDArray]:
    """Put one entry in front of every row, such as ``<cls>``.

    Parameters
    ----------
    indptr
        Where each row begins and ends.
    values
        The rows' entries.
    first
        The new first entry of each row, converted to the type of ``values``.

    Returns
    -------
    The new ``indptr`` and values; every row is longer by one.
    """
    new_indptr = _indptr(np.diff(indptr) + 1)
    out = np.empty(new_indptr[-1], values.dtype)
    _prepend(new_indptr, indptr, values, values.dtype.type(first), out)
    return new_indptr, out


def pad_rows(indptr: NDArray[np.integer], values: NDArray, length: int, fill: float) -> NDArray:
    """Pad the rows to a rectangular array.

    Parameters
    ----------
    indptr
        Where each row begins and ends.
    values
        The rows' entries.
    length
        Width of the result; no row may be longer.
    fill
        Padding value, converted to the type of ``values``.

    Returns
    -------
    Array (n_rows, length).
    """
    longest = np.diff(indptr).max(initial=0)
    if longest > length:
        raise ValueError(
            f"Expected rows of at most length={length} entries, got one of {longest}. Crop the rows first."
        )
    out = np.full((indptr.size - 1, length), fill, values.dtype)
    _pad(indptr, values, out)
    return out


def _indptr(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    indptr = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=indptr[1:])
    return indptr


@row_kernel
def _take(new_indptr, indptr, rows, array, out):
    for i in prange(rows.size):
        begin = indptr[rows[i]]
        start, stop = new_indptr[i], new_indptr[i + 1]
        # copying a slice is 1.7 times as fast as a loop
        out[start:stop] = array[begin : begin + stop - start]


@jit
def _restrict(indptr, indices, data, ids, new_indptr, kept_ids, kept):
    # unsigned, because numba checks at every signed position whether it is negative, which takes half the time
    n = np.uint64(0)
    new_indptr[0] = 0
    for row in range(indptr.size - 1):
        for j in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            kept_ids[n], kept[n] = ids[np.uint64(indices[j])], data[j]
            n += np.uint64((kept_ids[n] >= 0) & (data[j] != 0))
        new_indptr[row + 1] = n


@jit
def _restrict_in_order(indptr, indices, data, place, ids, new_indptr, kept_ids, kept):
    one, six, last = np.uint64(1), np.uint64(6), np.uint64(63)
    at_place = np.empty(ids.size, data.dtype)
    # one bit a place, so that a row of few entries is read off in few steps
    taken = np.zeros(ids.size // 64 + 1, np.uint64)
    n = np.uint64(0)
    for row in range(indptr.size - 1):
        for j in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
            signed = place[np.uint64(indices[j])]
            if signed >= 0 and data[j] != 0:
                p = np.uint64(signed)
                at_place[p] = data[j]
                taken[p >> six] |= one << (p & last)
        for word in range(taken.size):
            bits, taken[word] = taken[word], np.uint64(0)
            while bits:
                lowest = bits & (~bits + one)
                p = (np.uint64(word) << six) + np.uint64(_PLACE_OF_BIT[lowest * np.uint64(_DE_BRUIJN) >> np.uint64(58)])
                kept_ids[n], kept[n] = ids[p], at_place[p]
                n += one
                bits ^= lowest
        new_indptr[row + 1] = n


@jit
def _sum_repeats(indptr, ids, values, new_indptr, kept_ids, sums):
    n = 0
    for row in range(indptr.size - 1):
        start, end = indptr[row], indptr[row + 1]
        while start < end:
            stop = start + 1
            while stop < end and ids[stop] == ids[start]:
                stop += 1
            kept_ids[n] = ids[start]
            sums[n] = values[start] if stop == start + 1 else np.sort(values[start:stop]).sum()
            n += 1
            start = stop
        new_indptr[row + 1] = n


@row_kernel
def _crop_top(indptr, values, is_byte, new_indptr, positions):
    for row in prange(indptr.size - 1):
        begin, end = indptr[row], indptr[row + 1]
        start, n_kept = new_indptr[row], new_indptr[row + 1] - new_indptr[row]
        if n_kept == end - begin:
            for j in range(n_kept):
                positions[start + j] = begin + j
        elif n_kept:
            lowest, room = _nth_highest(values[begin:end], n_kept, is_byte)
            _crop_row(values[begin:end], lowest, room, begin, positions[start : start + n_kept])


@jit
def _nth_highest(values, n, is_byte):
    """Find the lowest of the n highest values, and how many of the n are equal to it."""
    if not is_byte:
        return _nth_by_buckets(values, n)
    # counting bins takes a fifth of the time of partitioning them
    tally = np.zeros(256, np.int64)
    for value in values:
        tally[np.uint8(value)] += 1
    value, n_above = np.uint8(255), 0
    while n_above + tally[value] < n:
        n_above += tally[value]
        value -= np.uint8(1)
    return values.dtype.type(value), n - n_above


@jit
def _nth_by_buckets(values, n):
    """Sort values roughly into buckets, and search only the bucket that contains the answer."""
    lowest, highest = values.min(), values.max()
    scale = (_BUCKETS - 1) / (np.float64(highest) - np.float64(lowest))
    if not 0 < scale < np.inf:  # all equal, or too far apart for buckets
        return _nth_by_sorting(values, n)
    tally = np.zeros(_BUCKETS, np.uint32)
    for value in values:
        tally[_bucket(value, lowest, scale)] += np.uint32(1)
    bucket, n_above = _BUCKETS - 1, 0
    while n_above + tally[bucket] < n:
        n_above += tally[bucket]
        bucket -= 1
    inside = np.empty(tally[bucket] + 1, values.dtype)  # one more, as other values are overwritten
    i = np.uint64(0)
    for value in values:
        inside[i] = value
        i += np.uint64(_bucket(value, lowest, scale) == np.uint64(bucket))
    return _nth_by_sorting(inside[:-1], n - n_above)


@jit
def _bucket(value, lowest, scale):
    return np.uint64(np.int64((np.float64(value) - lowest) * scale))


@jit
def _nth_by_sorting(values, n):
    rising = np.sort(values)
    at = rising.size - n
    room = np.int64(0)
    while at + room < rising.size and rising[at + room] == rising[at]:
        room += 1
    return rising[at], room


@jit
def _crop_row(values, lowest, room, begin, positions):
    """Find positions of the highest values; of those equal to the lowest kept value, the earliest are kept."""
    n, j, n_kept = np.uint64(0), np.uint64(0), np.uint64(positions.size)
    # positions that are not kept are overwritten by the next, because branches here would be mispredicted
    while n < n_kept:
        is_lowest = np.uint64((values[j] == lowest) & (room > 0))
        positions[n] = begin + np.int64(j)
        n += np.uint64(values[j] > lowest) | is_lowest
        room -= np.int64(is_lowest)
        j += np.uint64(1)


@jit
def _prepend(new_indptr, indptr, values, first, out):
    for row in range(indptr.size - 1):
        start, stop = new_indptr[row], new_indptr[row + 1]
        out[start] = first
        out[start + 1 : stop] = values[indptr[row] : indptr[row + 1]]


@jit
def _pad(indptr, values, out):
    for row in range(indptr.size - 1):
        begin, end = indptr[row], indptr[row + 1]
        out[row, : end - begin] = values[begin:end]
