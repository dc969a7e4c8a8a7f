from __future__ import annotations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming

from scllm.kernels.draws import _row_keys, _uniform_entries, draw, mix, row_keys, uniform_entries

MASK = 2**64 - 1
integers = st.integers(-(2**63), 2**63 - 1)


def splitmix(z):
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def mix_slowly(*parts, state=0):
    for part in parts:
        state = splitmix(state ^ splitmix(int(part) & MASK))
    return state


@given(st.lists(integers, min_size=1, max_size=4))
def test_mix_is_splitmix_of_one_part_after_the_other(parts):
    assert int(mix(*parts)) & MASK == mix_slowly(*parts)


def test_mix_broadcasts_arrays_of_any_integer_type():
    rows = np.arange(5, dtype=np.uint16)
    keys = mix(3, rows[:, None], np.array([7, -1], np.int32))
    assert keys.dtype == np.int64
    assert [[int(key) & MASK for key in row] for row in keys] == [[mix_slowly(3, r, i) for i in (7, -1)] for r in rows]


@given(integers, st.integers(0, 2**31), st.lists(st.integers(0, 2**31 - 1), max_size=9))
@settings(deadline=None)
def test_a_draw_depends_on_key_salt_and_id(key, salt, ids):
    drawn = uniform_entries(np.array([0, len(ids)]), np.array(ids, np.int32), np.array([key]), salt)
    assert drawn.tolist() == [(mix_slowly(salt, i, state=key & MASK) >> 11) * 2.0**-53 for i in ids]


def test_a_draw_stays_with_its_entry_when_rows_and_entries_move():
    ids, keys = np.array([4, 9, 2, 9]), np.array([11, 12])
    drawn = uniform_entries(np.array([0, 3, 4]), ids, keys)
    moved = uniform_entries(np.array([0, 1, 4]), ids[::-1].copy(), keys[::-1].copy())
    np.testing.assert_array_equal(drawn, moved[::-1])


def test_draws_are_uniform_and_salts_make_them_independent():
    indptr, ids = np.array([0, 100_000]), np.arange(100_000)
    a, b = (uniform_entries(indptr, ids, mix(0, np.arange(1)), salt) for salt in (0, 1))
    assert 0 <= a.min()
    assert a.max() < 1
    # five standard errors
    assert np.abs(np.histogram(a, 10, (0, 1))[0] - 10_000).max() < 5 * np.sqrt(9000)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(100_000)


def test_the_scalar_draw_is_the_same_inside_other_kernels():
    @numba.njit
    def one(key, salt, entry):
        return draw(key, salt, entry)

    key = mix(5)
    inside = one(np.uint64(int(key) & MASK), np.uint64(2), np.uint64(77))
    assert inside == uniform_entries(np.array([0, 1]), np.array([77]), np.array([key]), 2)[0]


@given(st.sets(st.integers(0, 2**31 - 1), max_size=12), st.randoms(use_true_random=False), integers)
@settings(deadline=None)
def test_a_row_key_depends_on_the_set_of_ids_and_the_seed(ids, random, seed):
    shuffled = random.sample(sorted(ids), len(ids))
    rows = np.array([*sorted(ids), *shuffled], np.int32)
    one, other = row_keys(np.array([0, len(ids), 2 * len(ids)]), rows, seed)
    total = sum(splitmix(i) for i in ids) & MASK
    assert one == other
    assert int(one) & MASK == splitmix(splitmix(seed & MASK) ^ splitmix(total))


def test_other_ids_and_other_seeds_give_other_row_keys():
    indptr, ids = np.arange(0, 3001, 3), np.random.default_rng(0).permutation(3000)
    assert np.unique([row_keys(indptr, ids, 0), row_keys(indptr, ids, 1)]).size == 2000


def test_draws_do_not_depend_on_the_number_of_threads():
    indptr, ids = np.arange(0, 300_001, 100), np.arange(300_000)
    keys, out = np.empty(3000, np.uint64), np.empty(300_000)
    _row_keys.serial(indptr, ids, np.uint64(3), keys)
    np.testing.assert_array_equal(row_keys(indptr, ids, 3), keys.view(np.int64))
    _uniform_entries.serial(indptr, ids, keys, np.uint64(1), out)
    np.testing.assert_array_equal(uniform_entries(indptr, ids, keys.view(np.int64), 1), out)


def test_keys_of_another_type_than_integer_are_refused():
    with pytest.raises(TypeError, match=naming("float64")):
        mix(0.5)
