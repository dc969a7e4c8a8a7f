"""Expression that is predicted from images: log-normalised counts, or values as they are stored."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.checks import read_checked
from scllm.data.value_kind import value_kind

__all__ = ["TARGET_SUM", "dense", "normalised"]

TARGET_SUM = 1e4
"""Total that each spot is normalised to, over all genes of the data."""


def normalised(source: CellSource, rows: IntArray, *, is_counts: bool | None = None) -> CSR:
    """Read rows as ``log1p(count / total * 10,000)`` (float32) if they hold counts, and otherwise as they are.

    The total is over all genes of the data. ``is_counts=None``: found out from these rows.
    """
    matrix = read_checked(source, rows)
    if is_counts is None:
        is_counts = value_kind(matrix) == "counts"
    data = matrix.data.astype(np.float32)
    if is_counts:
        total = np.asarray(matrix.sum(axis=1)).ravel()
        with np.errstate(divide="ignore"):
            data = np.log1p(data * np.repeat(TARGET_SUM / total, np.diff(matrix.indptr))).astype(np.float32)
    return sparse.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def dense(matrix: CSR, columns: IntArray) -> FloatArray:
    """Return chosen columns of a few rows as a dense array, ``(n, g)`` float32."""
    return matrix[:, columns].toarray().astype(np.float32, copy=False)
