"""The order of cells that are read from files: chunks of neighbouring rows, dealt to shards that ranks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scllm._typing import FloatArray, IntArray
from scllm.data.plan import Read, n_batches
from scllm.kernels.draws import mix

__all__ = ["Shards", "check_world"]

# Smallest number of chunks of a shard, so that a shard has cells from several parts of a small file. By default, a file
# with so few cells is read in one or two blocks, where smaller chunks hardly take more time.
_CHUNKS_A_SHARD = 4
# separates the draws of cells from those of masks
_SALT = 0x5A4D


@dataclass(frozen=True)
class Shards:
    """How cells are ordered if single random rows are slow to read.

    In every epoch, chunks of neighbouring rows are shuffled, joined to one sequence, and cut into shards of equal
    length. Cell ``p`` of the epoch comes from shard ``p % n_shards``, and ranks share the shards. The cells of a batch
    therefore do not depend on the number of ranks. The rows that a number of batches take from one shard are shuffled
    among each other, and are read at once.

    Parameters
    ----------
    chunk
        Largest number of neighbouring rows that are read together.
    n_shards
        Number of shards, and the largest number of ranks.
    shuffle_cells
        Number of cells in memory, over all ranks: half of them are used while the other half is read. Two batches are
        in memory in any case.
    """

    chunk: int
    n_shards: int = 64
    shuffle_cells: int = 1 << 16

    def plan(
        self,
        n_obs: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        weights: FloatArray | None = None,
    ) -> Iterator[Read]:
        """Plan which rows one rank reads for every batch of one epoch; see :func:`scllm.data.plan.plan`.

        With ``weights``, the number of times that a row is drawn is random with the given mean. A chunk that is drawn
        often is read at several places of the epoch.

        Yields
        ------
        One :class:`Read` for several batches, of at most ``shuffle_cells / 2`` rows over all ranks.
        """
        check_world(world, self.n_shards)
        sequence = _shuffled_chunks(self, n_obs, seed, epoch, weights)
        n = n_batches(n_obs, batch_size)
        n_blocks = -(-n // max(1, self.shuffle_cells // (2 * batch_size)))
        edges = np.linspace(0, n, n_blocks + 1).astype(int)
        for block in range(int(np.searchsorted(edges, start, side="right")) - 1, n_blocks):
            first, last = int(edges[block]), int(edges[block + 1])
            stop = min(last * batch_size, n_obs)
            rows = self._block(sequence, first * batch_size, stop, (seed, epoch, block), rank, world)
            mine = np.flatnonzero(rows >= 0)
            skipped = max(0, start - first)
            mine = mine[np.searchsorted(mine, skipped * batch_size) :]
            sizes = np.bincount(mine // batch_size, minlength=last - first)[skipped:]
            yield Read(rows[mine], first * batch_size + mine, tuple(sizes.tolist()))

    def largest_share(self, batch_size: int, world: int) -> int:
        """Bound the number of cells of a batch that one rank has."""
        share = -(-batch_size // world)
        if self.n_shards % world:
            # the rank of the first shards may come again early, at each return from the last shard to the first
            share += 1 + (batch_size - 1) // self.n_shards
        return min(share, batch_size)

    def _block(
        self, sequence: _Sequence, start: int, stop: int, key: tuple[int, int, int], rank: int, world: int
    ) -> IntArray:
        """Return the rows of cells ``start`` to ``stop`` of the epoch, with -1 for those of other ranks."""
        rows = np.full(stop - start, -1)
        seed, epoch, block = key
        for shard in range(rank, self.n_shards, world):
            its = rows[(shard - start) % self.n_shards :: self.n_shards]
            if not len(its):
                continue
            # the first shards have one row more if n_obs is no multiple of their number
            length, rest = divmod(sequence.n_draws, self.n_shards)
            first = shard * length + min(shard, rest) - (shard - start) // self.n_shards
            # shards count from 1, because numpy takes (seed, epoch, 0, 0) for (seed, epoch)
            mixing = np.random.default_rng((seed, epoch, shard + 1, block))
            its[:] = mixing.permutation(sequence.rows(first, first + len(its)))
        return rows


def check_world(world: int, n_shards: int) -> None:
    """Raise if there are more ranks than shards."""
    if world > n_shards:
        raise ValueError(
            f"Expected at most n_shards={n_shards} processes for data that are read from files, got {world}. Start "
            "fewer processes, or start another run with TrainConfig(n_shards=...)."
        )


@dataclass(frozen=True)
class _Sequence:
    """Shuffled chunks, joined to a sequence of draws; a chunk of large weight is there several times.

    Parameters
    ----------
    n_draws
        Length of the sequence.
    firsts
        First row of each chunk, in the shuffled order.
    lengths
        Number of rows of each chunk.
    ends
        Where each chunk ends in the sequence.
    weights
        Weight of each row.
    key
        Seed and epoch, for draws.
    """

    n_draws: int
    firsts: IntArray
    lengths: IntArray
    ends: IntArray | FloatArray
    weights: FloatArray | None
    key: tuple[int, int]

    def rows(self, start: int, stop: int) -> IntArray:
        """Return the rows of draws ``start`` to ``stop``."""
        draws = np.arange(start, stop)
        if self.weights is None:
            chunk = np.searchsorted(self.ends, draws, side="right")
            return self.firsts[chunk] + draws - self.ends[chunk] + self.lengths[chunk]
        # Draw i is uniform between i and i + 1 of the cumulative weights, which sum to the number of draws. A row is
        # then drawn as often as its weight says on average, and nearly so in each epoch.
        at = draws + (mix(*self.key, draws, _SALT).view(np.uint64) >> np.uint64(11)) * 2.0**-53
        chunk = np.minimum(np.searchsorted(self.ends, at, side="right"), len(self.ends) - 1)
        rows = np.empty(len(draws), np.int64)
        for one in np.unique(chunk):
            its, first, begin = chunk == one, self.firsts[one], self.ends[one - 1] if one else 0.0
            reach = np.cumsum(self.weights[first : first + self.lengths[one]], dtype=np.float64)
            share = (at[its] - begin) / (self.ends[one] - begin)
            # rounding must not lead to the end of the chunk, where weights may be zero
            below = np.minimum(share * reach[-1], np.nextafter(reach[-1], 0))
            rows[its] = first + np.searchsorted(reach, below, side="right")
        return rows


def _shuffled_chunks(shards: Shards, n_obs: int, seed: int, epoch: int, weights: FloatArray | None) -> _Sequence:
    size = min(shards.chunk, max(1, n_obs // (shards.n_shards * _CHUNKS_A_SHARD)))
    firsts = np.arange(0, n_obs, size)
    lengths = np.minimum(size, n_obs - firsts)
    rng = np.random.default_rng((seed, epoch))
    if weights is None:
        order = rng.permutation(len(firsts))
        return _Sequence(n_obs, firsts[order], lengths[order], np.cumsum(lengths[order]), None, (seed, epoch))
    n_drawn = np.add.reduceat(weights, firsts, dtype=np.float64)
    n_drawn *= n_obs / n_drawn.sum()
    # so that the copies of a row are spread over the epoch, and not one after the other
    n_visits = np.ceil(n_drawn / size).astype(int)
    order = rng.permutation(np.repeat(np.arange(len(firsts)), n_visits))
    ends = np.cumsum(n_drawn[order] / n_visits[order])
    return _Sequence(n_obs, firsts[order], lengths[order], ends, weights, (seed, epoch))
