"""The rows that each rank reads, and their order, which is computed from the seed and the epoch without any state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scllm._typing import FloatArray, IntArray

__all__ = ["Read", "n_batches", "plan"]

# number of chunks whose rows are shuffled together: enough for a batch to have cells from all over the file
_CHUNKS_A_BLOCK = 64


@dataclass(frozen=True)
class Read:
    """Rows to read at once, and the sizes of the consecutive batches that they are divided into."""

    rows: IntArray
    sizes: tuple[int, ...]


def n_batches(n_obs: int, batch_size: int) -> int:
    """Count the batches of one epoch, which are the same on every rank and for every kind of storage."""
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
    """Plan which rows one rank reads for every batch of one epoch.

    Parameters
    ----------
    n_obs
        Number of cells in the source.
    batch_size
        Number of cells of one step, over all ranks.
    seed, epoch
        Random seed and number of the epoch, which together determine the order.
    rank, world
        This process and the number of processes. With ``chunk=1``, the union over ranks does not depend on ``world``.
    chunk
        Number of consecutive rows that are read together: 1 in memory, ``chunk_rows`` of the source on disk.
    weights
        Probability of drawing each row, up to a factor. Rows are then drawn with replacement (upsampling).

    Yields
    ------
    One :class:`Read` per batch in memory, or one per block of at least 64 chunks on disk.
    """
    rng = np.random.default_rng((seed, epoch))
    if weights is not None:
        # the storage may read the drawn rows in its own order; that does not change the batches
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
    # every rank shuffles with its own generator, seeded after the permutation that all ranks share
    mixing = np.random.default_rng((int(rng.integers(2**63)), rank))
    # the sequence of shuffled chunks is cut into one part per rank, as long as the rank's shares of all batches
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
    """Count the cells of each batch that a rank gets, as in ``_deal``."""
    n_whole, rest = divmod(n_obs, batch_size)
    shares = [len(range(rank, n_cells, world)) for n_cells in (batch_size, rest)]
    return [shares[0]] * n_whole + [shares[1]] * (rest > 0)


def _rows_between(start: int, stop: int, chunks: IntArray, ends: IntArray, chunk: int) -> IntArray:
    """Return rows ``start`` to ``stop`` of the concatenated chunks; ``ends`` holds the end of each chunk."""
    if start == stop:
        return np.empty(0, np.int64)
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
    lengths = np.diff(ends[first : last + 1], prepend=ends[first - 1] if first else 0)
    rows = [np.arange(c * chunk, c * chunk + length) for c, length in zip(chunks[first : last + 1], lengths)]
    skip = start - (ends[first] - lengths[0])
    return np.concatenate(rows)[skip : skip + stop - start]
