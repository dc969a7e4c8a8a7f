"""Recognising whether a matrix holds counts, scaled counts, logarithms of either, or something else."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scllm._typing import CSR, FloatArray

__all__ = ["JUDGED_CELLS", "ValueKind", "as_counts", "is_log_like", "is_near_integer", "value_kind"]

ValueKind = Literal["counts", "scaled", "logged", "other"]

# number of cells that are judged: more of them do not change the answer
JUDGED_CELLS = 512
_READ_CELLS = 4_096

# the natural logarithm of a count normalised to one million is below 13.9
_LOGGED_BELOW = 14.0
_BASES = {"e": 1.0, "2": np.log(2), "10": np.log(10)}
# Highest multiple of the unit to test. Logarithms rounded to 3 decimals are off by 0.06 at 20, those of real data less.
_HIGHEST_MULTIPLE, _TOLERANCE = 20.5, 0.1
# a cell with few genes may have no count of 1; its lowest value is then 2 or 3 units
_UNITS = (1, 2, 3)
_FEWEST_TESTS = 5
# share of values that must pass: of real multiples nearly all do, of other values a fifth to a half
_PASSES = 0.8
# up to this value, noise of 1e-4 is far below the distance of integers
_TELLING = 1_000


def is_near_integer(values: NDArray) -> NDArray[np.bool_]:
    """Whether values are integers up to floating-point noise: within 1e-3, or from 10 on within 1e-4 of the value."""
    if values.dtype.kind in "biu":
        return np.ones(values.shape, bool)
    return np.abs(values - np.rint(values)) <= np.maximum(1e-3, 1e-4 * np.abs(values))


def as_counts(matrix: CSR) -> CSR:
    """Remove floating-point noise from the cells that hold counts; without noise, the matrix itself is returned.

    A cell holds counts if all its values are near integers. Each cell is judged on its own, so that its values do not
    depend on the other cells.
    """
    if matrix.dtype.kind in "biu":
        return matrix
    rounded = np.rint(matrix.data)
    if np.array_equal(rounded, matrix.data):
        return matrix
    holds_counts = _holds_counts(matrix)
    data = np.where(np.repeat(holds_counts, np.diff(matrix.indptr)), rounded, matrix.data)
    clean = type(matrix)((data, matrix.indices, matrix.indptr), shape=matrix.shape)
    clean.has_canonical_format = matrix.has_canonical_format
    return clean


def _holds_counts(matrix: CSR) -> NDArray[np.bool_]:
    """Return which cells hold integers up to noise, ``(n_cells,)``.

    Large values are near integers by chance, so a cell that has no other values must hold integers exactly.
    """
    values = matrix.data
    telling = (values > 0) & (values <= _TELLING)
    inexact = np.abs(values - np.rint(values)) > 1e-3
    far, n_telling, n_inexact = (_row_sums(matrix, flags) for flags in (~is_near_integer(values), telling, inexact))
    return (far == 0) & ((n_telling > 0) | (n_inexact == 0))


def _row_sums(matrix: CSR, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.diff(np.concatenate([[0], np.cumsum(flags)])[matrix.indptr])


def value_kind(matrix: CSR) -> ValueKind:
    """Classify non-negative values by the values within each of up to 512 cells spread over the matrix.

    Within a cell, scaled counts (normalised, or 0.93 times the counts) are multiples of a unit, the value of a single
    count. Logarithms become such multiples after ``expm1`` (or its equivalent for base 2 or 10). Cells that hold counts
    are ignored, unless all cells do.
    """
    odd = np.flatnonzero(~_holds_counts(matrix))
    if not len(odd):
        return "counts"
    chosen = odd[np.linspace(0, len(odd) - 1, min(JUDGED_CELLS, len(odd))).astype(int)]
    tests = np.array([_tests(matrix.data[matrix.indptr[i] : matrix.indptr[i + 1]]) for i in chosen])  # (cell, form, 2)
    n_passed, n_tested = tests.sum(axis=0).T
    share = np.where(n_tested >= _FEWEST_TESTS, n_passed / np.maximum(n_tested, 1), 0)
    if share.max() < _PASSES:
        return "other"
    return "scaled" if share[0] >= share.max() else "logged"


def is_log_like(matrix: Any) -> bool:
    """Whether values should not be log-transformed again: they are logarithms, were centred, or may be denoised ones.

    The matrix may be dense or sparse and may hold negative values. Up to 4,096 cells spread over it are read.
    """
    rows = np.linspace(0, matrix.shape[0] - 1, min(_READ_CELLS, matrix.shape[0])).astype(int)
    part = sparse.csr_matrix(matrix[rows])
    if not part.nnz or part.data.min() < 0:
        return bool(part.nnz)
    kind = value_kind(part)
    return kind == "logged" or (kind == "other" and bool(part.data.max() < _LOGGED_BELOW))


def _tests(values: FloatArray) -> list[tuple[int, int]]:
    """Count the distinct values of a cell that are multiples of the unit and those tested, for each possible form.

    The forms are the values themselves and their inverse logarithms to each base.
    """
    distinct = np.unique(values[values > 0].astype(np.float64))
    forms = [distinct, *(np.expm1(np.minimum(distinct * base, 50)) for base in _BASES.values())]
    limits = [np.inf, *(_LOGGED_BELOW / base for base in _BASES.values())]
    return [
        _multiples(form) if len(distinct) > 1 and distinct[-1] < limit else (0, 0)
        for form, limit in zip(forms, limits, strict=True)
    ]


def _multiples(values: FloatArray) -> tuple[int, int]:
    """Count how many of the ascending values are multiples of the best unit, and how many were tested."""
    best = (0, 0)
    for unit in _UNITS:
        multiple = values[1:] / values[0] * unit
        # values close to the lowest are the same count as it, and would pass in any form
        multiple = multiple[(multiple > unit + _TOLERANCE) & (multiple < _HIGHEST_MULTIPLE)]
        passed = int((np.abs(multiple - np.rint(multiple)) <= _TOLERANCE).sum())
        if passed * best[1] > best[0] * len(multiple) or not best[1]:
            best = passed, len(multiple)
    return best
