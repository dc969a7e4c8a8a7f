"""Which rows are read, in which order, on which rank. Order is a function of (seed, epoch), not a state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scllm._typing import FloatArray, IntArray

__all__ = ["Read", "n_batches", "plan"]

# chunks whose rows are mixed with each other: enough for a batch to see cells from all over the file
_CHUNKS_A_BLOCK = 64


@dataclass(frozen=True)
class Read:
    """Rows to read at once, and how many of them, one after the other, make each batch."""

    rows: IntArray
    sizes: tuple[int, ...]


def n_batches(n_obs: int, batch_size: int) -> int:
    """Batches of one epoch, the same on every rank and wherever the cells are stored."""
    return -(-n_obs // batch_size)


def plan(
    n_obs: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    chunk: int = 1,
    weights: FloatArray | None = None,
) -> Iterator[Read]:
    """Rows of every batch of one epoch, for one rank.

    Parameters
    ----------
    n_obs
        Cells in the source.
    batch_size
        Cells of one step over all ranks.
    seed, epoch
        What the order is a function of.
    rank, world
        This process and the number of processes. With ``chunk=1`` the union over ranks does not depend on ``world``.
    chunk
        Neighbouring rows that are read together: 1 in memory, the storage's own granularity out of core.
    weights
        Probability of drawing each row, up to a factor: rows are drawn with replacement (upsampling).

    Yields
    ------
    One :class:`Read` a batch in memory, one a block of at least 64 chunks out of core.
    """
    rng = np.random.default_rng((seed, epoch))
    if weights is not None:
        # drawn rows are read in memory order where the storage prefers that, the batches stay as drawn
        order = rng.choice(n_obs, size=n_obs, p=weights / weights.sum())
        yield from _deal(order, batch_size, rank, world)
    elif chunk == 1:
        yield from _deal(rng.permutation(n_obs), batch_size, rank, world)
    else:
        yield from _deal_chunks(n_obs, batch_size, rng, rank, world, chunk)


def _deal(order: IntArray, batch_size: int, rank: int, world: int) -> Iterator[Read]:
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size][rank::world]
        yield Read(rows, (len(rows),))


def _deal_chunks(
    n_obs: int, batch_size: int, rng: np.random.Generator, rank: int, world: int, chunk: int
) -> Iterator[Read]:
    chunks = rng.permutation(-(-n_obs // chunk))
    ends = np.cumsum(np.minimum(chunk, n_obs - chunks * chunk))
    # every rank mixes with its own numbers, drawn after the permutation that all share
    mixing = np.random.default_rng((int(rng.integers(2**63)), rank))
    # the shuffled chunks, one after the other, are cut into one part a rank, as long as its shares of all batches
    start = sum(sum(_shares(n_obs, batch_size, before, world)) for before in range(rank))
    sizes = _shares(n_obs, batch_size, rank, world)
    n_blocks = max(1, sum(sizes) // (_CHUNKS_A_BLOCK * chunk))
    edges = np.linspace(0, len(sizes), n_blocks + 1).astype(int)
    for first, last in pairwise(edges):
        stop = start + sum(sizes[first:last])
        rows = _rows_between(start, stop, chunks, ends, chunk)
        yield Read(mixing.permutation(rows), tuple(sizes[first:last]))
        start = stop


def _shares(n_obs: int, batch_size: int, rank: int, world: int) -> list[int]:
    """Cells of each batch that fall on a rank, as when a batch in memory is dealt out."""
    n_whole, rest = divmod(n_obs, batch_size)
    shares = [len(range(rank, n_cells, world)) for n_cells in (batch_size, rest)]
    return [shares[0]] * n_whole + [shares[1]] * (rest > 0)


def _rows_between(start: int, stop: int, chunks: IntArray, ends: IntArray, chunk: int) -> IntArray:
    """Rows ``start`` to ``stop`` of the chunks laid one after the other; ``ends`` says where each of them ends."""
    if start == stop:
        return np.empty(0, np.int64)
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
    lengths = np.diff(ends[first : last + 1], prepend=ends[first - 1] if first else 0)
    rows = [np.arange(c * chunk, c * chunk + length) for c, length in zip(chunks[first : last + 1], lengths)]
    skip = start - (ends[first] - lengths[0])
    return np.concatenate(rows)[skip : skip + stop - start]
