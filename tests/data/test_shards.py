"""The order of cells in files: shards that any number of ranks share, and chunks that are read together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from anndata import read_h5ad
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import naming

from scllm.data.shards import Shards

shapes = {
    "n_obs": st.integers(1, 800),
    "size": st.integers(1, 64),
    "chunk": st.integers(1, 40),
    "shuffle_cells": st.integers(1, 600),
    "seed": st.integers(0, 2**32),
}
# number of shards, and a number of ranks that may have them
shards_and_ranks = st.sampled_from([1, 6, 64]).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


def plans(n_obs, size, *, chunk, world=1, n_shards=64, shuffle_cells=1 << 16, seed=0, epoch=0, start=0, weights=None):
    """What each rank reads."""
    shards = Shards(chunk, n_shards, shuffle_cells)
    settings = {"seed": seed, "epoch": epoch, "start": start, "world": world, "weights": weights}
    return [list(shards.plan(n_obs, size, rank=rank, **settings)) for rank in range(world)]


def steps(*args, **settings):
    """The rows of each step, rank by rank."""
    found = []
    for reads in plans(*args, **settings):
        for read in reads:
            assert len(read.rows) == len(read.places) == sum(read.sizes)
        found.append([rows for read in reads for rows in np.split(read.rows, np.cumsum(read.sizes)[:-1])])
    return list(zip(*found, strict=True))


def unions(*args, **settings):
    """The rows of each step, sorted."""
    return [sorted(np.concatenate(step).tolist()) for step in steps(*args, **settings)]


@given(**shapes, shared_by=shards_and_ranks, epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_every_row_comes_once_an_epoch_in_full_batches(n_obs, size, chunk, shuffle_cells, seed, shared_by, epoch):
    n_shards, world = shared_by
    how = {"chunk": chunk, "shuffle_cells": shuffle_cells, "n_shards": n_shards, "seed": seed, "epoch": epoch}
    found = unions(n_obs, size, world=world, **how)
    assert sorted(row for step in found for row in step) == list(range(n_obs))
    assert [len(step) for step in found[:-1]] == [size] * ((n_obs - 1) // size)
    assert len(found[-1]) == (n_obs - 1) % size + 1


@given(**shapes, shared_by=shards_and_ranks, weighted=st.booleans())
@settings(deadline=None, max_examples=50)
def test_the_cells_of_a_step_do_not_depend_on_the_number_of_ranks(
    n_obs, size, chunk, shuffle_cells, seed, shared_by, weighted
):
    n_shards, world = shared_by
    weights = np.random.default_rng(seed).uniform(0, 5, n_obs) if weighted else None
    how = {"chunk": chunk, "shuffle_cells": shuffle_cells, "n_shards": n_shards, "seed": seed, "weights": weights}
    assert unions(n_obs, size, world=world, **how) == unions(n_obs, size, **how)


@given(**shapes, world=st.integers(1, 6), weighted=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=50)
def test_a_step_is_reached_without_reading_what_comes_before(
    n_obs, size, chunk, shuffle_cells, seed, world, weighted, data
):
    weights = np.random.default_rng(seed).uniform(0, 5, n_obs) if weighted else None
    how = {
        "chunk": chunk,
        "shuffle_cells": shuffle_cells,
        "n_shards": 6,
        "seed": seed,
        "weights": weights,
        "world": world,
    }
    whole = steps(n_obs, size, **how)
    start = data.draw(st.integers(0, len(whole)))
    for step, expected in zip(steps(n_obs, size, start=start, **how), whole[start:], strict=True):
        for rows, rank_expected in zip(step, expected, strict=True):
            np.testing.assert_array_equal(rows, rank_expected)
    for reads in plans(n_obs, size, start=start, **how):
        assert all((read.places >= start * size).all() for read in reads)


@given(**shapes, world=st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_two_consecutive_reads_of_all_ranks_fit_into_shuffle_cells(n_obs, size, chunk, shuffle_cells, seed, world):
    found = plans(n_obs, size, chunk=chunk, shuffle_cells=shuffle_cells, n_shards=6, seed=seed, world=world)
    n_rows = [sum(len(read.rows) for read in reads) for reads in zip(*found, strict=True)]
    # a read has at least one batch
    assert max([*n_rows, *(a + b for a, b in pairwise(n_rows))]) <= max(shuffle_cells, 2 * size)


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 64), st.integers(1, 300))
@settings(deadline=None, max_examples=50)
def test_a_step_is_shared_out_as_evenly_as_shards_are(n_obs, size, world, chunk):
    for step in steps(n_obs, size, chunk=chunk, world=world)[:-1]:
        n_cells = [len(rows) for rows in step]
        assert max(n_cells) <= Shards(chunk).largest_share(size, world)
        # the shards of 64 cells in a row are all different, and a rank has at most one shard more than another
        assert max(n_cells) - min(n_cells) <= 2


@given(st.integers(1, 300), shards_and_ranks)
@settings(deadline=None, max_examples=50)
def test_the_largest_share_of_a_batch_is_known(size, shared_by):
    n_shards, world = shared_by
    found = steps(2000, size, chunk=1, n_shards=n_shards, world=world)
    assert max(len(rows) for step in found for rows in step) <= Shards(1, n_shards).largest_share(size, world)
    if n_shards % world == 0:
        assert len(found[0][0]) == Shards(1, n_shards).largest_share(min(size, 2000), world)


def test_seed_and_epoch_determine_the_order():
    def order(seed, epoch):
        return tuple(np.concatenate(steps(3000, 16, chunk=16, seed=seed, epoch=epoch), axis=None).tolist())

    assert order(0, 0) == order(0, 0)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_neighbours_are_read_together():
    (reads,) = plans(400_000, 32, chunk=100)
    assert len(reads) == 13
    for read in reads:
        rows = np.sort(read.rows)
        n_runs = 1 + (np.diff(rows) > 1).sum()
        # 481 rows of each of 64 shards: four chunks and parts of two
        assert n_runs <= 64 * 6


def test_a_small_file_is_read_at_once_in_a_random_order():
    (reads,) = plans(20_000, 32, chunk=256)
    (read,) = reads
    spread = np.std([rows.mean() for rows in np.split(read.rows, 20_000 // 32)])
    # as random cells: 20,000 / sqrt(12 * 32) = 1021
    assert 700 < spread < 1100


def test_more_ranks_than_shards_are_an_error():
    with pytest.raises(ValueError, match=naming("n_shards=8", "9")):
        plans(100, 10, chunk=4, n_shards=8, world=9)


def entropy(codes):
    share = np.bincount(codes) / len(codes)
    return -(share[share > 0] * np.log(share[share > 0])).sum()


def mean_entropy(codes, batches):
    return np.mean([entropy(codes[rows]) for rows in batches if len(rows) == 64])


def sorted_labels(shared, name, key):
    if name is None:
        return np.repeat(np.arange(20), 2000)
    return np.sort(read_h5ad(shared / "data" / f"{name}.h5ad").obs[key].cat.codes.to_numpy())


@pytest.mark.parametrize("buffer", [1 / 64, 1 / 16, 1 / 4])
@pytest.mark.parametrize(
    ("name", "key"), [(None, None), ("pbmc_zheng2017_facs", "cell_type"), ("perturb_papalexi2021_subset", "guide")]
)
def test_batches_of_a_file_sorted_by_label_have_as_many_labels_as_random_ones(shared, name, key, buffer):
    codes = sorted_labels(shared, name, key)
    n = len(codes)
    random = np.split(np.random.default_rng(0).permutation(n), range(64, n, 64))
    found = [rows for (rows,) in steps(n, 64, chunk=256, shuffle_cells=int(n * buffer))]
    assert mean_entropy(codes, found) >= 0.98 * mean_entropy(codes, random)


# draws with weights


def drawn(weights, n_epochs, chunk, **settings):
    """How often each row is drawn, on average."""
    n = len(weights)
    rows = [
        row for epoch in range(n_epochs) for row in steps(n, 16, chunk=chunk, epoch=epoch, weights=weights, **settings)
    ]
    return np.bincount(np.concatenate(rows, axis=None), minlength=n) / n_epochs


def test_rows_are_drawn_as_often_as_their_weights_say():
    weights = np.random.default_rng(0).choice([0, 0.1, 1, 30], 500).astype(np.float32)
    found, expected = drawn(weights, 200, chunk=20, n_shards=8), weights / weights.sum() * 500
    assert found.sum() == pytest.approx(500)
    assert (found[weights == 0] == 0).all()
    # a draw is uniform in an interval, so the variance of a count is at most 1 / 2 for each time that its chunk is read
    assert (np.abs(found - expected) <= 5 * np.sqrt(0.5 * np.ceil(expected) / 200)).all()


def test_an_epoch_has_the_share_of_each_group():
    groups = np.repeat([0, 1, 2], [9000, 900, 100])
    weights = np.array([1 / 9000, 1 / 900, 1 / 100])[groups]
    (reads,) = plans(10_000, 64, chunk=64, weights=weights)
    share = np.bincount(groups[np.concatenate([read.rows for read in reads])]) / 10_000
    np.testing.assert_allclose(share, 1 / 3, atol=0.01)


def test_cells_that_are_drawn_often_are_spread_over_the_epoch():
    # the last 100 rows are half of all draws, each 500 times
    weights = np.where(np.arange(100_000) < 99_900, 1 / 99_900, 1 / 100)
    (reads,) = plans(100_000, 100, chunk=100, weights=weights, shuffle_cells=4000)
    rows = np.concatenate([read.rows for read in reads])
    is_rare = (rows >= 99_900).reshape(-1, 1000).mean(1)
    assert np.abs(is_rare - 0.5).max() < 0.35
    for row in rows[rows >= 99_900][:20]:
        # 20 draws of a row are expected in every 25th of the epoch
        assert np.histogram(np.flatnonzero(rows == row), 25, (0, 100_000))[0].min() > 0


def test_weighted_draws_read_chunks_too():
    weights = np.where(np.arange(400_000) % 2000 < 1000, 1.0, 0.2)
    for read in plans(400_000, 32, chunk=100, weights=weights)[0]:
        chunks = np.unique(read.rows // 100)
        assert len(read.rows) / len(chunks) > 30
