from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.strategies import ragged, rows_of
from messages import naming

from scllm.kernels.ragged import (
    _crop_top,
    _take,
    crop_random,
    crop_top,
    pad_rows,
    prepend,
    restrict,
    restrict_in_order,
    sum_repeats,
    take_rows,
)  # fmt: skip

slow_first_call = settings(deadline=None, max_examples=60)


def assert_rows_equal(indptr, values, expected):
    assert indptr.dtype == np.int64
    assert [row.tolist() for row in rows_of(indptr, values)] == [list(row) for row in expected]


@slow_first_call
@given(ragged(), st.data())
def test_take_rows_gathers_every_array(rows, data):
    indptr, values = rows
    n_rows = indptr.size - 1
    wanted = np.array(data.draw(st.lists(st.integers(0, n_rows - 1), max_size=8)) if n_rows else [], np.int64)
    positions = np.arange(values.size, dtype=np.int32)
    new_indptr, taken, taken_positions = take_rows(indptr, wanted, values, positions)
    assert_rows_equal(new_indptr, taken, [rows_of(indptr, values)[i] for i in wanted])
    assert_rows_equal(new_indptr, taken_positions, [rows_of(indptr, positions)[i] for i in wanted])
    assert (taken.dtype, taken_positions.dtype) == (values.dtype, positions.dtype)


@slow_first_call
@given(ragged(), st.integers(0, 2**32))
def test_restrict_keeps_known_columns_and_values_other_than_zero(rows, seed):
    indptr, values = rows
    rng = np.random.default_rng(seed)
    columns, ids = rng.integers(0, 10, values.size), rng.integers(-1, 3, 10)
    new_indptr, kept_ids, kept = restrict(indptr, columns, values, ids)
    keep = (ids[columns] >= 0) & (values != 0)
    assert_rows_equal(new_indptr, kept, [row[k] for row, k in zip(*(rows_of(indptr, a) for a in (values, keep)))])
    np.testing.assert_array_equal(kept_ids, ids[columns][keep])
    assert (kept_ids.dtype, kept.dtype) == (np.int32, values.dtype)


@slow_first_call
@given(st.integers(0, 2**32), st.integers(0, 200), st.sampled_from([np.float32, np.int64]))
def test_restrict_in_order_sorts_what_restrict_keeps(seed, n_columns, dtype):
    rng = np.random.default_rng(seed)
    dense = (rng.integers(0, 4, (5, n_columns)) * (rng.random((5, 1)) < 0.8)).astype(dtype)
    cell, column = np.nonzero(rng.random(dense.shape) < 0.7)  # zeros among them
    indptr, values = np.searchsorted(cell, np.arange(6)), dense[cell, column]
    place = rng.permutation(n_columns).astype(np.int32)
    place[rng.random(n_columns) < 0.2] = -1
    ids = np.arange(n_columns, dtype=np.int32) * 3
    new_indptr, kept_ids, kept = restrict_in_order(indptr, column, values, place, ids)
    expected, unsorted_ids, unsorted = restrict(indptr, column, values, place * 3)
    np.testing.assert_array_equal(new_indptr, expected)
    order = np.lexsort([unsorted_ids, np.repeat(np.arange(5), np.diff(expected))])
    np.testing.assert_array_equal(kept_ids, unsorted_ids[order])
    np.testing.assert_array_equal(kept, unsorted[order])
    assert (kept_ids.dtype, kept.dtype) == (np.int32, values.dtype)


def test_repeats_are_summed_in_float64_whatever_their_order():
    values = np.array([2.0**24, 1, 1, 5, 7], np.float32)
    for order in ([0, 1, 2, 3, 4], [2, 0, 1, 3, 4], [1, 2, 0, 3, 4]):
        indptr, ids, sums = sum_repeats(np.array([0, 3, 3, 5]), np.array([4, 4, 4, 4, 9]), values[order])
        assert (indptr.tolist(), ids.tolist(), sums.tolist()) == ([0, 1, 1, 3], [4, 4, 9], [2.0**24 + 2, 5, 7])
        assert sums.dtype == np.float64


@slow_first_call
@given(
    ragged(dtypes=(np.float32, np.float64, np.int32, np.int64, np.uint8), kinds=("counts", "ties")), st.integers(0, 60)
)
def test_crop_top_keeps_the_highest_and_of_equal_ones_the_earliest(rows, max_len):
    indptr, values = rows
    new_indptr, positions = crop_top(indptr, values, max_len)
    starts = indptr[:-1].astype(int)
    best = [np.sort(np.argsort(-row.astype(float), kind="stable")[:max_len]) for row in rows_of(indptr, values)]
    assert_rows_equal(new_indptr, positions, [start + row for start, row in zip(starts, best)])


@slow_first_call
@given(ragged(), st.integers(0, 60))
def test_crop_random_keeps_the_smallest_draws_in_order(rows, max_len):
    indptr, values = rows
    draws = np.random.default_rng(0).random(values.size)
    new_indptr, positions = crop_random(indptr, max_len, draws)
    best = [np.sort(np.argsort(row)[:max_len]) for row in rows_of(indptr, draws)]
    assert_rows_equal(new_indptr, positions, [start + row for start, row in zip(indptr[:-1].astype(int), best)])


@slow_first_call
@given(ragged(), st.integers(0, 5))
def test_prepend_puts_one_entry_in_front_of_every_row(rows, first):
    indptr, values = rows
    new_indptr, longer = prepend(indptr, values, first)
    assert_rows_equal(new_indptr, longer, [[first, *row] for row in rows_of(indptr, values)])
    assert longer.dtype == values.dtype


@slow_first_call
@given(ragged(), st.integers(0, 3), st.integers(-2, 2))
def test_pad_rows_fills_behind_the_rows(rows, more, fill):
    indptr, values = rows
    length = int(np.diff(indptr).max(initial=0)) + more
    padded = pad_rows(indptr, values, length, fill)
    expected = [[*row, *[fill] * (length - row.size)] for row in rows_of(indptr, values)]
    assert padded.dtype == values.dtype
    assert padded.tolist() == expected


def test_pad_rows_refuses_a_row_that_is_too_long():
    with pytest.raises(ValueError, match=naming(3, "length=2")):
        pad_rows(np.array([0, 1, 4]), np.ones(4), 2, 0)


def test_rows_out_of_the_middle_of_a_matrix_are_understood():
    indptr, values = np.array([2, 4, 7]), np.arange(10)
    assert crop_top(indptr, values, 2)[1].tolist() == [2, 3, 5, 6]
    assert crop_top(indptr, values, 5)[1].tolist() == [2, 3, 4, 5, 6]
    assert_rows_equal(*prepend(indptr, values, 0), [[0, 2, 3], [0, 4, 5, 6]])
    assert_rows_equal(*take_rows(indptr, [1, 0], values), [[4, 5, 6], [2, 3]])
    assert restrict(indptr, values, values, np.arange(10))[0].tolist() == [0, 2, 5]


def test_rows_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(0)
    indptr = np.concatenate([[0], np.cumsum(rng.integers(0, 700, 900))])
    values = rng.integers(0, 50, indptr[-1])
    new_indptr, positions = crop_top(indptr, values, 300)
    serial = np.empty_like(positions)
    _crop_top.serial(indptr, values, False, new_indptr, serial)
    np.testing.assert_array_equal(positions, serial)
    rows = rng.permutation(900)
    new_indptr, taken = take_rows(indptr, rows, values)
    serial = np.empty_like(taken)
    _take.serial(new_indptr, indptr, rows, values, serial)
    np.testing.assert_array_equal(taken, serial)
