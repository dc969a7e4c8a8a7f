"""Reading and encoding of batches in background threads."""

from __future__ import annotations

import threading
import weakref
from contextlib import closing

import numpy as np
import pytest
from anndata import AnnData
from engine.runs import wait_until
from messages import naming
from scipy import sparse

import scllm
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine.loader import Loader, prefetched


class Watched:
    """A source that notes what is read from it, and which blocks are still in memory when another is read."""

    def __init__(self, source):
        self.source, self.rows, self.blocks, self.alive = source, [], [], []

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, rows):
        self.alive.append(sum(block() is not None for block in self.blocks))
        block = self.source.read(rows)
        self.rows.append(rows)
        self.blocks.append(weakref.ref(block))
        return block


@pytest.fixture
def file(tmp_path):
    scllm.datasets.toy(n_cells=600, n_genes=40).write_h5ad(tmp_path / "toy.h5ad")
    return tmp_path / "toy.h5ad"


@pytest.fixture
def loader(file, model):
    """A loader of six blocks of 100 cells from a file."""
    source = Watched(open_source(file))
    rows = np.arange(600)
    return Loader(
        source, rows, genes.match(source.genes, model.vocab), model.encoder, model.vocab, 20, shuffle_cells=200
    )


def reading():
    return [thread for thread in threading.enumerate() if thread.name == "scllm-prefetch"]


def test_the_next_block_is_read_while_one_is_in_use_but_not_the_one_after_it(loader):
    with closing(loader.epoch(0)) as batches:
        for number, _ in enumerate(batches):
            # at most four batches are encoded ahead of the one in use
            n_blocks = min((number + 5) // 5 + 1, 6)
            wait_until(lambda n=n_blocks: len(loader.source.rows) >= n, seconds=10)
            assert len(loader.source.rows) <= (number + 1 + 4) // 5 + 2
    assert number == 29
    assert [len(rows) for rows in loader.source.rows] == [100] * 6


def test_never_more_than_two_blocks_are_in_memory(loader):
    assert len(list(loader.epoch(0))) == 30
    assert max(loader.source.alive) <= 1  # beside the one that is being read


def test_threads_end_when_the_loop_ends_early(loader):
    with closing(loader.epoch(0)) as batches:
        next(batches)
        assert len(reading()) == 2
    assert not reading()


def test_starting_later_gives_the_same_batches_and_reads_no_cell_before(loader):
    whole = [parts[0] for parts in loader.epoch(3)]
    loader.source.rows.clear()
    later = [parts[0] for parts in loader.epoch(3, start=13)]
    assert len(later) == 17
    for found, expected in zip(later, whole[13:], strict=True):
        assert found.lengths == expected.lengths
        assert (found.genes == expected.genes).all()
    assert sum(len(rows) for rows in loader.source.rows) == 17 * 20


def test_more_processes_than_shards_are_an_error_of_the_call(loader):
    with pytest.raises(ValueError, match=naming("n_shards=64", 65)):
        loader.epoch(0, world=65)


def test_in_memory_ranks_get_cells_of_about_the_same_length(toy, model):
    # a cell has 1 to 40 genes, most of them few
    n_genes = np.random.default_rng(0).geometric(0.1, 600).clip(max=40)
    counts = sparse.csr_matrix((np.arange(40) < n_genes[:, None]).astype(np.float32))
    source = open_source(AnnData(counts, var=toy.var))
    cells = Loader(source, np.arange(600), genes.match(source.genes, model.vocab), model.encoder, model.vocab, 20)
    ranks = [list(cells.epoch(0, rank=rank, world=3)) for rank in range(3)]
    for step in zip(*ranks, strict=True):
        n_tokens = [sum(parts[0].lengths) for parts in step]
        # the longest cell, and one <cls> where a rank has one cell more
        assert max(n_tokens) - min(n_tokens) <= max(max(parts[0].lengths) for parts in step) + 1


def test_a_cell_that_is_drawn_twice_gets_two_keys(loader, toy, model):
    weights = np.where(np.arange(600) < 5, 1.0, 0.001)
    for source in (loader.source, open_source(scllm.datasets.toy(n_cells=600, n_genes=40))):
        drawn = Loader(
            source, np.arange(600), loader.match, model.encoder, model.vocab, 20,
            weights=weights, obs={"cell": np.arange(600)},
        )  # fmt: skip
        batches = [parts[0] for parts in drawn.epoch(0)]
        cells = np.concatenate([batch.obs["cell"] for batch in batches])
        keys = np.concatenate([batch.keys for batch in batches])
        assert len(np.unique(cells)) < 300
        assert len(np.unique(keys)) == 600


def test_an_error_of_the_thread_is_raised_after_what_came_before_it():
    def made():
        yield 1
        raise ValueError("no more")

    items = prefetched(made)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)
    assert not reading()


def test_nothing_is_made_beyond_the_room():
    made = []

    def numbers():
        for number in range(10):
            made.append(number)
            yield number

    with closing(prefetched(numbers, ahead=2)) as items:
        assert next(items) == 0
        wait_until(lambda: len(made) == 3, seconds=10)
        assert next(items) == 1
        wait_until(lambda: len(made) == 4, seconds=10)
    assert len(made) <= 5
