"""Radix sort of one row."""

from __future__ import annotations

import numpy as np

from scllm.kernels._jit import jit

__all__ = ["N_DIGITS", "sort_row"]

_DIGIT_BITS = 8
N_DIGITS = 1 << _DIGIT_BITS


@jit
def sort_row(values, bits, is_float, keys, digits):
    """Sort the non-zero values into ``keys[0]`` (as bits) and return how many there are."""
    top = bits.dtype.type(1) << bits.dtype.type(8 * bits.itemsize - 1)
    n = 0
    for j in range(values.size):
        # floats sort like unsigned integers after flipping the sign bit, and for negative ones all other bits too
        flip = ~bits.dtype.type(0) if is_float and bits[j] & top else top
        keys[0, n] = bits[j] ^ flip
        n += np.int64(values[j] != 0)
    source = _radix_sort(keys, n, 8 * bits.itemsize, digits)
    for j in range(n):
        key = keys[source, j]
        keys[0, j] = key ^ (~bits.dtype.type(0) if is_float and not key & top else top)
    return n


@jit
def _radix_sort(keys, n, n_bits, digits):
    """Sort ``keys[0, :n]`` digit by digit, lowest first, between two buffers; return the buffer with the result."""
    source = 0
    for shift in range(0, n_bits, _DIGIT_BITS):
        by = keys.dtype.type(shift)
        low = keys.dtype.type(N_DIGITS - 1)
        digits[:] = 0
        for j in range(n):
            digits[(keys[source, j] >> by) & low] += 1
        if n == 0 or digits[(keys[source, 0] >> by) & low] == n:
            continue
        total = 0
        for digit in range(N_DIGITS):
            digits[digit], total = total, total + digits[digit]
        for j in range(n):
            digit = (keys[source, j] >> by) & low
            keys[1 - source, digits[digit]] = keys[source, j]
            digits[digit] += 1
        source = 1 - source
    return source
