"""Which rows are read, in which order, on which rank. Order is a function of (seed, epoch), not a state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scllm._typing import FloatArray, IntArray

__all__ = ["Read", "n_batches", "plan"]

# rows that are mixed with each other out of core: enough chunks for a batch to see the whole file
_CHUNKS_A_BLOCK = 64


@dataclass(frozen=True)
class Read:
    """Rows to read at once, and how many of them, one after the other, make each batch."""

    rows: IntArray
    sizes: tuple[int, ...]


def n_batches(n_obs: int, batch_size: int, *, world: int = 1, chunk: int = 1) -> int:
    """Batches of one epoch, the same on every rank."""
    if chunk == 1:
        return -(-n_obs // batch_size)
    # the rank with most rows sets the number; others end with empty batches
    n_chunks = -(-n_obs // chunk)
    most = min(n_obs, -(-n_chunks // world) * chunk)
    return -(-most // max(1, batch_size // world))


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
    One :class:`Read` a batch in memory, one a block of chunks out of core.
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
    n_chunks = -(-n_obs // chunk)
    mine = rng.permutation(n_chunks)[rank::world]
    # every rank mixes with its own numbers, drawn after the permutation that all share
    mixing = np.random.default_rng((int(rng.integers(2**63)), rank))
    size = max(1, batch_size // world)
    left = np.empty(0, np.int64)
    done, total = 0, n_batches(n_obs, batch_size, world=world, chunk=chunk)
    # a block holds whole batches: enough chunks to mix well, at least one batch
    step = max(_CHUNKS_A_BLOCK, -(-size // chunk))
    for start in range(0, len(mine), step):
        chunks = mine[start : start + step]
        rows = np.concatenate([np.arange(c * chunk, min((c + 1) * chunk, n_obs)) for c in chunks])
        rows = np.concatenate([left, mixing.permutation(rows)])
        last = start + step >= len(mine)
        whole = len(rows) if last else len(rows) // size * size
        rows, left = rows[:whole], rows[whole:]
        if whole:
            sizes = tuple(min(size, whole - at) for at in range(0, whole, size))
            done += len(sizes)
            yield Read(rows, sizes)
    for _ in range(total - done):
        yield Read(np.empty(0, np.int64), (0,))
