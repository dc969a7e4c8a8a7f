"""Counter-based random numbers, which depend on what they are for and not on when they are drawn.

A draw depends on a key, an entry's id and a salt, but not on position, batch, thread or process. Mixing is splitmix64
(Steele, Lea & Flood 2014). Keys are passed around as int64, because torch has no arithmetic on uint64.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from numpy.typing import ArrayLike, NDArray

from scllm.kernels._jit import jit, row_kernel

__all__ = ["draw", "mix", "row_keys", "uniform_entries"]

# unsigned constants only: numba turns uint64 combined with a plain integer into a float
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_S11, _S27, _S30, _S31 = np.uint64(11), np.uint64(27), np.uint64(30), np.uint64(31)
_UNIT = 2.0**-53


def mix(*parts: ArrayLike) -> NDArray[np.int64]:
    """Make keys from integers, such as ``mix(random_state, epoch, rows)``.

    Parameters
    ----------
    parts
        Integers and integer arrays, which broadcast. Their order matters: ``mix(1, 2)`` is not ``mix(2, 1)``.

    Returns
    -------
    int64 keys of the broadcast shape; a scalar if all parts are scalars. Keys can be parts of further keys.
    """
    state = np.zeros((1,), np.uint64)
    for part in parts:
        state = _scramble_array(state ^ _scramble_array(_as_uint64(part)))
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts))
    return state.reshape(shape).view(np.int64)[()]


def uniform_entries(
    indptr: NDArray[np.integer], ids: NDArray[np.integer], keys: NDArray[np.integer], salt: int = 0
) -> NDArray[np.float64]:
    """Draw one number in [0, 1) for each entry of ragged rows.

    Parameters
    ----------
    indptr
        Where each row begins and ends.
    ids
        Id of each entry, for instance its gene. The same id in a row with the same key gets the same draw, whatever its
        position and the other entries of the row.
    keys
        One key per row, from :func:`mix` or :func:`row_keys`.
    salt
        Separates draws for different purposes (ties, random subsets, masking) under the same key.

    Returns
    -------
    Draws (n_entries,), multiples of 2**-53.
    """
    out = np.empty(ids.size, np.float64)
    _uniform_entries(indptr, ids, _as_uint64(keys), _as_uint64(salt)[0], out)
    return out


def row_keys(indptr: NDArray[np.integer], ids: NDArray[np.integer], seed: int) -> NDArray[np.int64]:
    """Compute a key of each row that depends only on the set of its ids and on the seed.

    The order of the ids does not matter, so a cell keeps its key when genes are sorted differently. The ids of a row
    must be distinct.

    Parameters
    ----------
    indptr
        Where each row begins and ends.
    ids
        Integer id of each entry, for instance the gene's token.
    seed
        Random seed.

    Returns
    -------
    int64 keys (n_rows,).
    """
    out = np.empty(indptr.size - 1, np.uint64)
    _row_keys(indptr, ids, _as_uint64(seed)[0], out)
    return out.view(np.int64)


@jit
def draw(key, salt, entry):
    """Draw a number in [0, 1) for one entry, for use in other kernels; all arguments are uint64."""
    return _to_unit(_combine(_combine(key, salt), entry))


def _as_uint64(values: ArrayLike) -> NDArray[np.uint64]:
    """Convert to uint64 with at least one dimension: numpy warns of overflow, which is intended here, in scalars."""
    values = np.atleast_1d(np.asarray(values))
    if values.dtype.kind not in "iu":
        raise TypeError(f"Expected integers to make keys from, got {values.dtype}. Convert them to int64.")
    return values.astype(np.uint64 if values.dtype.kind == "u" else np.int64, copy=False).view(np.uint64)


def _scramble_array(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + _STEP
    z = (z ^ (z >> _S30)) * _FIRST
    z = (z ^ (z >> _S27)) * _SECOND
    return z ^ (z >> _S31)


@jit
def _scramble(z):
    z = z + _STEP
    z = (z ^ (z >> _S30)) * _FIRST
    z = (z ^ (z >> _S27)) * _SECOND
    return z ^ (z >> _S31)


@jit
def _combine(state, part):
    return _scramble(state ^ _scramble(part))


@jit
def _to_unit(state):
    return np.float64(state >> _S11) * _UNIT


@row_kernel
def _uniform_entries(indptr, ids, keys, salt, out):
    for row in prange(indptr.size - 1):
        salted = _combine(keys[row], salt)
        for j in range(indptr[row], indptr[row + 1]):
            out[j] = _to_unit(_combine(salted, np.uint64(ids[j])))


@row_kernel
def _row_keys(indptr, ids, seed, out):
    for row in prange(indptr.size - 1):
        total = np.uint64(0)
        for j in range(indptr[row], indptr[row + 1]):
            total = total + _scramble(np.uint64(ids[j]))
        out[row] = _combine(_scramble(seed), total)
