"""The rows of each batch on each rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scllm.data.plan import n_batches, plan

numbers = st.integers(0, 2**32)


def batches(n_obs, batch_size, *, rank=0, world=1, seed=0, epoch=0, chunk=1, weights=None):
    """The rows of each batch on one rank."""
    found = []
    for read in plan(n_obs, batch_size, seed=seed, epoch=epoch, rank=rank, world=world, chunk=chunk, weights=weights):
        assert len(read.rows) == sum(read.sizes)
        found += np.split(read.rows, np.cumsum(read.sizes)[:-1])
    return [rows.tolist() for rows in found]


def steps(n_obs, batch_size, world, **settings):
    """The rows of each step, rank by rank."""
    return list(zip(*(batches(n_obs, batch_size, rank=r, world=world, **settings) for r in range(world)), strict=True))


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 9), st.integers(1, 40), numbers, st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_every_row_comes_once_an_epoch_on_ranks_with_equally_many_batches(n_obs, size, world, chunk, seed, epoch):
    found = steps(n_obs, size, world, chunk=chunk, seed=seed, epoch=epoch)
    assert sorted(row for step in found for rows in step for row in rows) == list(range(n_obs))
    assert len(found) == n_batches(n_obs, size) == -(-n_obs // size)


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 9), st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_every_step_but_the_last_has_all_its_cells_shared_out_evenly(n_obs, size, world, chunk):
    *whole, last = steps(n_obs, size, world, chunk=chunk)
    for step in whole:
        lengths = [len(rows) for rows in step]
        assert sum(lengths) == size
        assert max(lengths) - min(lengths) <= 1
    assert sum(len(rows) for rows in last) == (n_obs - 1) % size + 1


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 9), st.booleans())
@settings(deadline=None)
def test_in_memory_the_cells_of_a_step_do_not_depend_on_the_number_of_ranks(n_obs, size, world, weighted):
    weights = np.random.default_rng(0).uniform(0.1, 1, n_obs) if weighted else None
    alone = [sorted(rows) for rows in batches(n_obs, size, weights=weights)]
    together = steps(n_obs, size, world, weights=weights)
    assert [sorted(row for rows in step for row in rows) for step in together] == alone


@pytest.mark.parametrize("chunk", [1, 16])
def test_seed_and_epoch_determine_the_order(chunk):
    def order(seed, epoch):
        return [row for rows in batches(300, 16, seed=seed, epoch=epoch, chunk=chunk) for row in rows]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_a_step_is_reached_without_reading_what_comes_before():
    reads = list(plan(10_000, 10, seed=0, epoch=0, chunk=8))
    assert len(reads) > 5
    # sizes alone say which read holds a step
    ends = np.cumsum([len(read.sizes) for read in reads])
    read = int(np.searchsorted(ends, 700, side="right"))
    at = 10 * (700 - int(ends[read - 1]))
    assert batches(10_000, 10, chunk=8)[700] == reads[read].rows[at : at + 10].tolist()


def test_out_of_core_neighbours_are_read_together():
    for read in plan(100_000, 32, seed=0, epoch=0, chunk=50):
        chunks, n_rows = np.unique(read.rows // 50, return_counts=True)
        # chunks at the two ends of a block may be cut
        assert (n_rows < 50).sum() <= 2
        assert len(chunks) >= 64


def test_out_of_core_a_batch_mixes_cells_from_all_over_the_file():
    in_order = np.arange(100_000) / 100_000
    found = batches(100_000, 64, chunk=100)
    # means of 64 random cells spread by 0.29 / 8 = 0.036; those of one chunk would spread by 0.29
    assert np.std([in_order[rows].mean() for rows in found]) < 0.05
    assert np.mean([len(np.unique(np.array(rows) // 100)) for rows in found]) > 32


@pytest.mark.parametrize(("n_obs", "size", "world", "chunk"), [(3, 32, 8, 64), (100, 2, 4, 16), (1, 1, 3, 7)])
def test_ranks_without_cells_get_empty_batches(n_obs, size, world, chunk):
    found = steps(n_obs, size, world, chunk=chunk)
    assert [] in [rows for step in found for rows in step]
    assert sorted(row for step in found for rows in step for row in rows) == list(range(n_obs))


def test_weights_say_how_often_a_row_is_drawn():
    weights = np.array([0.0, 1.0, 3.0])
    drawn = np.array(
        [row for epoch in range(4000) for rows in batches(3, 2, epoch=epoch, weights=weights) for row in rows]
    )
    share = np.bincount(drawn, minlength=3) / len(drawn)
    # five standard errors of 12,000 draws
    np.testing.assert_allclose(share, [0, 0.25, 0.75], atol=5 * np.sqrt(0.25 * 0.75 / 12_000))


def test_weights_need_not_add_up_to_one():
    weights = np.array([1.0, 2.0, 5.0, 2.0])
    assert batches(4, 2, weights=weights) == batches(4, 2, weights=weights / 10)
