"""Bin one row in the cheapest of three ways.

Rows with few distinct values, such as counts and normalised counts, are tallied rather than sorted: counts index the
tally directly, other values are looked up in a hash table. Rows with too many distinct values are sorted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scllm.kernels._jit import jit
from scllm.kernels._sorting import N_DIGITS, sort_row

__all__ = ["LEFT", "MIDDLE", "RANDOM", "RIGHT", "Scratch", "bin_row", "edges_of_sorted", "new_scratch"]

MIDDLE, LEFT, RIGHT, RANDOM = range(4)

_MAX_COUNT = 65_535  # counts are held as uint16
_SLOT_BITS = 11  # of the hash table; a quarter of the slots may be taken
_SLOTS = 1 << _SLOT_BITS
_MAX_DISTINCT = _SLOTS // 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Scratch(NamedTuple):
    """Memory for one row at a time, reused for the next. A code is the count itself or a number in a hash table."""

    codes: np.ndarray  # (longest,) the row; 0 for zeros
    tally: np.ndarray  # (4 * n_codes,) zeros between rows
    levels: np.ndarray  # (n_codes,) distinct values, rising
    names: np.ndarray  # (n_codes,) codes of the levels
    ends: np.ndarray  # (n_codes,) how many values are at most that level
    below: np.ndarray  # (n_codes,) by code: edges less than it
    upto: np.ndarray  # (n_codes,) by code: edges at most it
    bins: np.ndarray  # (n_codes,) by code: the bin, unless it is drawn
    edges: np.ndarray  # (n_bins - 1,)
    slots: np.ndarray  # hash table: codes, 0 where empty
    distinct: np.ndarray  # by code: the value
    keys: np.ndarray  # (2, longest) for the sort, which goes back and forth
    digits: np.ndarray  # for the sort: where each digit begins


@jit
def new_scratch(longest, data, bits, q, out):
    n_codes = 1024 + min(longest, _MAX_COUNT - 1023)
    return Scratch(
        np.empty(longest, np.uint16),
        np.zeros(4 * n_codes, np.uint32),
        np.empty(n_codes, data.dtype),
        np.empty(n_codes, np.int64),
        np.empty(n_codes, np.int64),
        np.zeros(n_codes, np.float64),
        np.zeros(n_codes, np.float64),
        np.zeros(n_codes, out.dtype),
        np.empty(q.size, np.float64),
        np.empty(_SLOTS, np.int16),
        np.empty(_MAX_DISTINCT, data.dtype),
        np.empty((2, longest), bits.dtype),
        np.empty(N_DIGITS, np.int64),
    )


@jit
def bin_row(values, bits, is_float, q, ties, draws, scratch, out):
    """Bin one row in the cheapest of three ways: as counts, as distinct values, or sorted."""
    n_codes, n_levels = 0, 0
    largest = _as_counts(values, scratch.codes)
    if 0 <= largest < scratch.levels.size:
        _tally(scratch, values.size)
        n_levels = _levels_of_counts(scratch, largest)
    else:
        n_codes = _hash_values(values, bits, scratch)
        if n_codes == 0:
            n = sort_row(values, bits, is_float, scratch.keys, scratch.digits)
            edges_of_sorted(scratch.keys[0, :n].view(values.dtype), q, scratch.edges)
            _bin_by_edges(values, scratch.edges, ties, draws, out)
            return
        _tally(scratch, values.size)
        n_levels = _levels_of_distinct(scratch, n_codes)
    _bin_by_code(scratch, n_levels, q, ties, draws, out)


@jit
def _as_counts(values, codes):
    """Copy the values into ``codes`` and return the largest; -1 if they are not all counts that fit."""
    largest = np.int32(0)
    n_wrong = np.int32(0)
    for j in range(values.size):
        value = values[j]
        # an out-of-range conversion is undefined, so it is made harmless first; no branches, this is vectorised
        code = np.int32(value if (value >= 0) & (value <= _MAX_COUNT) else values.dtype.type(0))
        n_wrong |= np.int32(code != value)
        largest = max(largest, code)
        codes[j] = code
    return -1 if n_wrong else np.int64(largest)


@jit
def _hash_values(values, bits, scratch):
    """Number the distinct non-zero values from 1; return how many codes that makes, 0 if there are too many."""
    codes, slots, distinct = scratch.codes, scratch.slots, scratch.distinct
    slots[:] = 0
    distinct[0] = 0
    n_codes = 1
    for j in range(values.size):
        if values[j] == 0:
            codes[j] = 0
            continue
        slot = (np.uint64(bits[j]) * _GOLDEN) >> np.uint64(64 - _SLOT_BITS)
        while slots[slot] and distinct[slots[slot]] != values[j]:
            slot = (slot + np.uint64(1)) & np.uint64(_SLOTS - 1)
        if not slots[slot]:
            if n_codes == _MAX_DISTINCT:
                return 0
            slots[slot], distinct[n_codes] = n_codes, values[j]
            n_codes += 1
        codes[j] = slots[slot]
    return n_codes


@jit
def _tally(scratch, n):
    """Count the codes in four alternating tallies: most counts are 1, and one counter would wait for its last write."""
    codes, tally = scratch.codes, scratch.tally
    for j in range(0, n - 3, 4):
        tally[np.uint64(4) * codes[j]] += np.uint32(1)
        tally[np.uint64(4) * codes[j + 1] + np.uint64(1)] += np.uint32(1)
        tally[np.uint64(4) * codes[j + 2] + np.uint64(2)] += np.uint32(1)
        tally[np.uint64(4) * codes[j + 3] + np.uint64(3)] += np.uint32(1)
    for j in range(n - n % 4, n):
        tally[np.uint64(4) * codes[j]] += np.uint32(1)


@jit
def _levels_of_counts(scratch, largest):
    """List the counts that occur."""
    tally, levels, names, ends = scratch.tally, scratch.levels, scratch.names, scratch.ends
    n_levels, covered = 0, 0
    tally[:4] = 0
    for count in range(1, largest + 1):
        i = 4 * count
        found = tally[i] + tally[i + 1] + tally[i + 2] + tally[i + 3]
        if found:
            covered += np.int64(found)
            levels[n_levels], names[n_levels], ends[n_levels] = count, count, covered
            n_levels += 1
            tally[i], tally[i + 1], tally[i + 2], tally[i + 3] = 0, 0, 0, 0
    return n_levels


@jit
def _levels_of_distinct(scratch, n_codes):
    """List the numbered values in ascending order."""
    tally, levels, names, ends = scratch.tally, scratch.levels, scratch.names, scratch.ends
    covered = 0
    order = np.argsort(scratch.distinct[1:n_codes])
    for i in range(n_codes - 1):
        code = order[i] + 1
        for k in range(4 * code, 4 * code + 4):
            covered += np.int64(tally[k])
        levels[i], names[i], ends[i] = scratch.distinct[code], code, covered
    tally[: 4 * n_codes] = 0
    return n_codes - 1


@jit
def _bin_by_code(scratch, n_levels, q, ties, draws, out):
    """Find the edges and bin by a table from code to bin."""
    codes, below, upto, bins, edges = scratch.codes, scratch.below, scratch.upto, scratch.bins, scratch.edges
    if n_levels:
        _edges_of_levels(scratch.levels, scratch.ends, n_levels, q, edges)
    i_below, i_upto = 0, 0
    for i in range(n_levels):
        level, code = np.float64(scratch.levels[i]), scratch.names[i]
        while i_below < edges.size and edges[i_below] < level:
            i_below += 1
        while i_upto < edges.size and edges[i_upto] <= level:
            i_upto += 1
        bins[code] = _pick(i_below, i_upto, ties)
        below[code], upto[code] = i_below, i_upto
    if ties == RANDOM:
        for j in range(out.size):
            high = upto[codes[j]]
            out[j] = np.int64(np.ceil(draws[j] * (below[codes[j]] - high) + high))
    else:
        for j in range(out.size):
            out[j] = bins[codes[j]]


@jit
def _edges_of_levels(levels, ends, n_levels, q, edges):
    """Compute quantiles of values, given as ascending levels and their cumulative counts."""
    n = ends[n_levels - 1]
    i = 0
    for k in range(q.size):
        place = (n - 1) * q[k]
        before = np.int64(place)
        while ends[i] <= before:
            i += 1
        if ends[i] > before + 1 or i == n_levels - 1:
            edges[k] = levels[i]
        else:
            edges[k] = _interpolate(levels[i], levels[i + 1], place - before)


@jit
def edges_of_sorted(values, q, edges):
    """Compute quantiles of ascending values."""
    n = values.size
    for k in range(q.size if n else 0):
        place = (n - 1) * q[k]
        before = np.int64(place)
        after = min(before + 1, n - 1)
        edges[k] = _interpolate(values[before], values[after], place - before)


@jit
def _interpolate(low, high, t):
    """Interpolate with numpy's own arithmetic: the difference in the type of the data, the rest in float64."""
    if t < 0.5:
        return low + np.float64(high - low) * t
    return high - np.float64(high - low) * (1 - t)


@jit
def _pick(below, upto, ties):
    """Select one of the bins below + 1 to upto (upto if there is none)."""
    if ties == MIDDLE:
        return (below + upto + 1) // 2
    return min(below + 1, upto) if ties == LEFT else upto


@jit
def _bin_by_edges(values, edges, ties, draws, out):
    """Bin values of any kind by searching for each among the edges."""
    first = np.empty(edges.size, np.int64)  # of the edges equal to this one
    for k in range(edges.size):
        first[k] = first[k - 1] if k and edges[k] == edges[k - 1] else k
    for j in range(values.size):
        value = np.float64(values[j])
        if value == 0:
            out[j] = 0
            continue
        upto = _n_upto(edges, value)
        below = first[upto - 1] if edges[upto - 1] == value else upto
        if ties == RANDOM:
            out[j] = np.int64(np.ceil(draws[j] * (below - upto) + upto))
        else:
            out[j] = _pick(below, upto, ties)


@jit
def _n_upto(edges, value):
    """Count the edges that are at most the value, by bisection without branches, which would be mispredicted."""
    start, n = 0, edges.size
    while n > 1:
        half = n // 2
        start += half if edges[start + half - 1] <= value else 0
        n -= half
    return start + np.int64(edges[start] <= value)
