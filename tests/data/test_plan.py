"""The rows of each batch on each rank, in memory; ``test_shards.py`` is about files."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scllm.data.plan import n_batches, plan

numbers = st.integers(0, 2**32)


def batches(n_obs, batch_size, *, rank=0, world=1, seed=0, epoch=0, start=0, weights=None, lengths=None):
    """The rows of each batch on one rank."""
    reads = plan(
        n_obs, batch_size, seed=seed, epoch=epoch, start=start, rank=rank, world=world, weights=weights, lengths=lengths
    )
    found = []
    for read in reads:
        assert [len(read.rows)] == list(read.sizes)
        found.append(read.rows.tolist())
    return found


def steps(n_obs, batch_size, world, **settings):
    """The rows of each step, rank by rank."""
    return list(zip(*(batches(n_obs, batch_size, rank=r, world=world, **settings) for r in range(world)), strict=True))


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 9), numbers, st.integers(0, 5))
@settings(deadline=None, max_examples=100)
def test_every_row_comes_once_an_epoch_on_ranks_with_equally_many_batches(n_obs, size, world, seed, epoch):
    found = steps(n_obs, size, world, seed=seed, epoch=epoch)
    assert sorted(row for step in found for rows in step for row in rows) == list(range(n_obs))
    assert len(found) == n_batches(n_obs, size) == -(-n_obs // size)


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=100)
def test_every_step_but_the_last_has_all_its_cells_shared_out_evenly(n_obs, size, world, by_length):
    lengths = np.random.default_rng(0).integers(1, 99, n_obs) if by_length else None
    *whole, last = steps(n_obs, size, world, lengths=lengths)
    for step in whole:
        n_cells = [len(rows) for rows in step]
        assert sum(n_cells) == size
        assert max(n_cells) - min(n_cells) <= 1
    assert sum(len(rows) for rows in last) == (n_obs - 1) % size + 1


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.data())
@settings(deadline=None)
def test_the_cells_of_a_step_do_not_depend_on_the_number_of_ranks(n_obs, size, world, weighted, by_length, data):
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 1, n_obs) if weighted else None
    lengths = rng.integers(1, 99, n_obs) if by_length else None
    alone = [sorted(rows) for rows in batches(n_obs, size, weights=weights)]
    start = data.draw(st.integers(0, len(alone)))
    together = steps(n_obs, size, world, weights=weights, lengths=lengths, start=start)
    assert [sorted(row for rows in step for row in rows) for step in together] == alone[start:]


@given(st.integers(1, 60), st.integers(1, 9), numbers)
@settings(deadline=None)
def test_ranks_get_batches_of_about_the_same_number_of_values(size, world, seed):
    lengths = np.random.default_rng(seed).lognormal(7, 1, 100).astype(int)
    for step in steps(100, size, world, lengths=lengths):
        n_values = [lengths[rows].sum() for rows in step]
        assert max(n_values) - min(n_values) <= max(lengths[row] for rows in step for row in rows)


def test_cells_that_are_dealt_by_length_stay_in_random_order():
    lengths = np.arange(1000)
    (rows,) = batches(1000, 1000, rank=1, world=4, lengths=lengths)
    assert abs(np.corrcoef(np.arange(250), rows)[0, 1]) < 0.2


def test_seed_and_epoch_determine_the_order():
    def order(seed, epoch):
        return [row for rows in batches(300, 16, seed=seed, epoch=epoch) for row in rows]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_ranks_without_cells_get_empty_batches():
    found = steps(3, 32, 8)
    assert [] in found[0]
    assert sorted(row for rows in found[0] for row in rows) == [0, 1, 2]


def test_weights_say_how_often_a_row_is_drawn():
    weights = np.array([0.0, 1.0, 3.0], np.float32)
    drawn = np.array(
        [row for epoch in range(4000) for rows in batches(3, 2, epoch=epoch, weights=weights) for row in rows]
    )
    share = np.bincount(drawn, minlength=3) / len(drawn)
    # five standard errors of 12,000 draws
    np.testing.assert_allclose(share, [0, 0.25, 0.75], atol=5 * np.sqrt(0.25 * 0.75 / 12_000))


def test_weights_need_not_add_up_to_one():
    weights = np.array([1.0, 2.0, 5.0, 2.0])
    assert batches(4, 2, weights=weights) == batches(4, 2, weights=weights / 10)


def test_a_row_that_is_drawn_twice_has_two_places():
    reads = [
        read for rank in range(3) for read in plan(50, 8, seed=0, epoch=0, rank=rank, world=3, weights=np.ones(50))
    ]
    places = np.concatenate([read.places for read in reads])
    assert len(np.unique(np.concatenate([read.rows for read in reads]))) < 50
    assert sorted(places) == list(range(50))
