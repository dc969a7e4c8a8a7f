"""The rows that each rank reads, and their order, which is computed from the seed and the epoch without any state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scllm._typing import FloatArray, IntArray

__all__ = ["Read", "n_batches", "plan"]


@dataclass(frozen=True)
class Read:
    """Rows to read at once, for one or several consecutive batches.

    Parameters
    ----------
    rows
        Rows, batch by batch.
    places
        Place of each row in the order of the epoch over all ranks. A row that is drawn twice has two places.
    sizes
        Number of rows of each batch.
    """

    rows: IntArray
    places: IntArray
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
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    weights: FloatArray | None = None,
    lengths: IntArray | None = None,
) -> Iterator[Read]:
    """Plan which rows one rank reads for every batch of one epoch, where single rows are fast to read.

    :meth:`scllm.data.shards.Shards.plan` does the same for files.

    Parameters
    ----------
    n_obs
        Number of cells in the source.
    batch_size
        Number of cells of one step, over all ranks.
    seed, epoch
        Random seed and number of the epoch, which together determine the order.
    start
        First batch to plan.
    rank, world
        This process and the number of processes. The union over ranks of a batch does not depend on ``world``.
    weights
        Probability of drawing each row, up to a factor. Rows are then drawn with replacement.
    lengths
        Number of values of each row. Ranks then get batches of about the same number of values, so that none waits
        for another.

    Yields
    ------
    One :class:`Read` per batch.
    """
    rng = np.random.default_rng((seed, epoch))
    if weights is None:
        order = rng.permutation(n_obs)
    else:
        weights = weights.astype(np.float64)
        order = rng.choice(n_obs, size=n_obs, p=weights / weights.sum())
    for first in range(start * batch_size, n_obs, batch_size):
        rows = order[first : first + batch_size]
        mine = _dealt(None if lengths is None else lengths[rows], len(rows), rank, world)
        yield Read(rows[mine], first + mine, (len(mine),))


def _dealt(lengths: IntArray | None, n: int, rank: int, world: int) -> IntArray:
    """Return which of the ``n`` cells of a batch are this rank's."""
    if lengths is None or world == 1:
        return np.arange(rank, n, world)
    # from the longest to the shortest, to the ranks in turn, there and back: 0 1 2 2 1 0 0 1 2 ...
    turn = np.arange(n) % (2 * world)
    by_length = np.argsort(-lengths, kind="stable")
    # in the order of the batch again, so that the long cells are not all in the first micro-batch
    return np.sort(by_length[np.minimum(turn, 2 * world - 1 - turn) == rank])
