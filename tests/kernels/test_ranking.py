"""Ranks against numpy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernels.strategies import ragged, rows_of

from scllm.kernels.ranking import rank_rows, scaled, top_rows


def order_slowly(indptr, keys):
    """Positions of all rows' entries, highest key first."""
    starts = indptr[:-1]
    rows = [start + np.argsort(-row, kind="stable") for start, row in zip(starts, rows_of(indptr, keys), strict=True)]
    return np.concatenate([np.empty(0, np.int64), *rows]).astype(np.int64)


@settings(deadline=None, max_examples=150)
@given(
    ragged(dtypes=(np.float32, np.int32), kinds=("counts", "wide counts", "ties", "normalised")), st.integers(1, 100)
)
@example((np.array([0, 0]), np.empty(0, np.float32)), 3)
@example((np.array([0]), np.empty(0, np.float32)), 3)
@example((np.array([0, 1]), np.array([5], np.float32)), 1)
def test_rows_fall_and_equal_keys_keep_their_order(data, most):
    indptr, keys = data
    order = order_slowly(indptr, keys.astype(np.float32))
    new_indptr, found = top_rows(indptr, keys, np.arange(len(keys), dtype=np.int32), most)
    expected = [row[:most] for row in rows_of(indptr, order)]
    assert [row.tolist() for row in rows_of(new_indptr, found)] == [row.tolist() for row in expected]
    ranks = np.concatenate([np.empty(0, np.int64), *(np.arange(n) + 1 for n in np.diff(indptr))])
    assert rank_rows(indptr, keys)[order].tolist() == ranks.tolist()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, width=32, allow_nan=False), max_size=40))
@example([0.0, -0.0, 0.0])
@example([np.inf, 3.4e38, 1e-45, 0.0])
def test_any_keys_that_are_not_negative_are_ordered(keys):
    keys, indptr = np.array(keys, np.float32), np.array([0, len(keys)])
    assert top_rows(indptr, keys, np.arange(len(keys)), 40)[1].tolist() == order_slowly(indptr, keys).tolist()


def test_many_long_rows_are_ordered_whatever_the_number_of_threads():
    rng = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 3000, 300))])
    keys = np.exp(rng.normal(0, 3, indptr[-1])).astype(np.float32).round(2)
    assert (top_rows(indptr, keys, np.arange(len(keys)), 10**6)[1] == order_slowly(indptr, keys)).all()


@pytest.mark.parametrize("n", [300, 5_000])
def test_keys_that_crowd_beside_one_far_away_are_ordered(n):
    keys = np.random.default_rng(0).permutation(n).astype(np.float32) * np.float32(1e-6) + np.float32(1)
    keys[n // 2] = 1e30
    indptr = np.array([0, n, 2 * n])
    keys = np.concatenate([keys, keys[::-1]])
    assert (top_rows(indptr, keys, np.arange(2 * n), n)[1] == order_slowly(indptr, keys)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_values_are_divided_by_the_scale_of_their_id(dtype):
    values, ids = np.array([6, 5, 4, 0], dtype), np.array([2, 0, 1, 2])
    assert scaled(values, ids, np.array([2, np.nan, 3])).tolist()[:2] == [2, 2.5]
    assert np.isnan(scaled(values, ids, np.array([2, np.nan, 3])))[2]
