"""Batches of packed cells, read and encoded in background threads while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.checks import read_checked
from scllm.data.encode import Encoder, LevelEncoder
from scllm.data.genes import GeneMatch
from scllm.data.plan import Read, n_batches, plan
from scllm.data.reference import Reference
from scllm.data.shards import Shards, check_world
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.engine.relational import COLUMN
from scllm.kernels.draws import mix
from scllm.kernels.ragged import take_rows
from scllm.kernels.thinning import thin
from scllm.models.batch import Batch, Measured

__all__ = ["Loader", "prefetched"]

T = TypeVar("T")

# makes the random draws of views independent of those of the cells themselves
_VIEW = 12


@dataclass(frozen=True)
class Loader:
    """Loader of batches of cells; the rows of each batch depend only on ``(seed, epoch)``.

    Parameters
    ----------
    source
        Source of the counts.
    rows
        Rows of the source to use.
    match
        The token of each gene of the source.
    encoder, vocab
        Turn counts into token sequences.
    batch_size
        Number of cells per step over all ranks.
    seed
        Seed for data order, random subsets of genes and masks.
    obs
        Columns to add to the batches, with values for all rows of the source.
    weights
        Probability of drawing each of ``rows``, up to a factor.
    n_shards, shuffle_cells
        The order of cells in files, see :class:`~scllm.data.shards.Shards`.
    downsample
        Count downsampling (binomial thinning): the largest share of counts that is removed from a cell.
    reference
        Principal components of the cells, for batches with views for relational pretraining.
    keep_whole
        Whether batches also contain the complete cells, with all their counts and genes.
    inputs
        Row of the cell that is read for each row of the source, ``(n_obs,)``; the complete cell of a batch is that of
        the row itself. ``None``: both are the same cell.
    training
        Whether random numbers differ between epochs, and long cells are reduced to a random subset of their genes.
    keep_empty
        Whether a rank (or micro-batch) without cells gets an empty batch, so that all ranks run equally many passes.
    pinned
        Whether batches are in pinned memory, so that copying them to a GPU overlaps with computation.
    """

    source: CellSource
    rows: IntArray
    match: GeneMatch
    encoder: Encoder
    vocab: Vocab
    batch_size: int
    seed: int = 0
    obs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    weights: FloatArray | None = None
    n_shards: int = 64
    shuffle_cells: int = 1 << 16
    downsample: float = 0.0
    reference: Reference | None = None
    keep_whole: bool = False
    inputs: IntArray | None = None
    training: bool = True
    keep_empty: bool = False
    pinned: bool = False

    def largest(self, world: int) -> tuple[int, int]:
        """Return the largest number of cells of one rank in a batch, and of tokens of a cell."""
        encoder, shards = self.encoder, self._shards
        n_cells = -(-self.batch_size // world) if shards is None else shards.largest_share(self.batch_size, world)
        return n_cells, min(encoder.max_len, len(self.vocab) + encoder.n_specials)

    def n_batches(self) -> int:
        """Return the number of batches per epoch, the same on every rank."""
        return n_batches(len(self.rows), self.batch_size)

    def epoch(
        self, epoch: int, *, start: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Generator[list[Batch], None, None]:
        """Yield this rank's cells of each step in ``parts`` micro-batches, starting with batch ``start``.

        Background threads read and encode ahead until the generator is exhausted or closed.
        """
        if self._shards:
            check_world(world, self.n_shards)  # raises here, and not in a thread
        reads = self._plan(epoch, start, rank, world)
        return prefetched(lambda: self._batches(reads, epoch if self.training else 0, parts))

    @property
    def _shards(self) -> Shards | None:
        """The order of training cells in files."""
        is_sharded = self.training and self.source.chunked
        return Shards(self.source.chunk_rows, self.n_shards, self.shuffle_cells) if is_sharded else None

    def _plan(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Read]:
        if not self.training:
            return self._in_order(start, rank, world)
        n, size, seed, weights = len(self.rows), self.batch_size, self.seed, self.weights
        if (shards := self._shards) is not None:
            return shards.plan(n, size, seed=seed, epoch=epoch, start=start, rank=rank, world=world, weights=weights)
        lengths = getattr(self.source, "lengths", None) if world > 1 else None
        if lengths is not None:
            lengths = lengths[self.rows]
        return plan(
            n, size, seed=seed, epoch=epoch, start=start, rank=rank, world=world, weights=weights, lengths=lengths
        )

    def _in_order(self, start: int, rank: int, world: int) -> Iterator[Read]:
        for first in range(start * self.batch_size, len(self.rows), self.batch_size):
            rows = np.arange(first, min(first + self.batch_size, len(self.rows)))[rank::world]
            yield Read(rows, rows, (len(rows),))

    def _batches(self, reads: Iterator[Read], epoch: int, parts: int) -> Generator[list[Batch], None, None]:
        read = self._read(reads)
        # the next block of a file is read while one is encoded, and the one after it when the first is used up
        with closing(prefetched(lambda: read, ahead=1) if self.source.chunked else read) as blocks:
            for block in blocks:
                yield from self._encode(*block, epoch, parts)

    def _read(self, reads: Iterator[Read]) -> Generator[tuple[Read, CSR, IntArray], None, None]:
        """Read the counts of each plan in the order of the file; say which belong to each row, then to its input."""
        for read in reads:
            rows = self.rows[read.rows]
            asked = rows if self.inputs is None else np.concatenate([rows, self.inputs[rows]])
            ascending, place = np.unique(asked, return_inverse=True)
            yield read, read_checked(self.source, ascending), place

    def _encode(
        self, read: Read, counts: CSR, place: IntArray, epoch: int, parts: int
    ) -> Generator[list[Batch], None, None]:
        """Encode batch by batch, because arrays of a whole read do not fit the caches."""
        rows = self.rows[read.rows]
        # a cell that is drawn twice in an epoch is masked twice
        draws = () if self.weights is None or not self.training else (read.places,)
        keys = mix(self.seed, epoch, rows, *draws)
        for first, last in pairwise(np.cumsum([0, *read.sizes])):
            chosen = rows[first:last]
            tokens = self.match.tokens(_taken(counts, place[first:last]), chosen)
            shown, of = tokens, chosen
            if self.inputs is not None:
                of = self.inputs[chosen]
                shown = self.match.tokens(_taken(counts, place[len(rows) :][first:last]), of)
            sequences, spacing = self._sequences(shown, of, keys[first:last])
            whole = self._whole(tokens, chosen) if self.keep_whole else None
            view = self._view(tokens, chosen, keys[first:last])
            cuts = np.linspace(first, last, parts + 1).astype(int)
            batches = [
                Batch.from_tokens(
                    sequences.slice(a - first, b - first),
                    keys[a:b],
                    {name: column[rows[a:b]] for name, column in self.obs.items()},
                    Measured.of(self.match, rows[a:b]),
                    None if whole is None else Batch.from_tokens(whole.slice(a - first, b - first), keys[a:b]),
                    None if spacing is None else spacing[a - first : b - first],
                    None if view is None else view.cells(a - first, b - first),
                )
                for a, b in pairwise(cuts)
                if b > a or self.keep_empty
            ]
            yield [batch.pin() for batch in batches] if self.pinned else batches

    def _sequences(self, tokens: Tokens, rows: IntArray, keys: IntArray) -> tuple[Tokens, FloatArray | None]:
        """Make the token sequences of a batch; in training also the number of a cell's genes per gene that is read."""
        if not self.training:
            return self._encoded(self.encoder, tokens, rows), None
        if self.downsample:
            tokens = Tokens(*thin(tokens.indptr, tokens.genes, tokens.values, keys, self.downsample))
        sequences = self._encoded(self.encoder, tokens, rows, keys)
        n_read = np.maximum(sequences.lengths - self.encoder.n_specials, 1)
        return sequences, np.maximum(self._n_genes(tokens, rows) / n_read, 1)

    def _encoded(self, encoder: Encoder, tokens: Tokens, rows: IntArray, keys: IntArray | None = None) -> Tokens:
        """Make the token sequences of cells, each with the genes that its own file measured."""
        by_file = self.match.by_file(rows)
        if len(by_file) <= 1:
            measured = by_file[0][0].measured if by_file else self.match.measured
            return encoder(tokens, self.vocab, keys, measured=measured)
        parts = [
            encoder(tokens.take(cells), self.vocab, None if keys is None else keys[cells], measured=file.measured)
            for file, cells in by_file
        ]
        return Tokens.stacked(parts, [cells for _, cells in by_file])

    def _n_genes(self, tokens: Tokens, rows: IntArray) -> IntArray:
        """Count the genes of each cell that would be read without a limit on the length."""
        if isinstance(self.encoder, LevelEncoder):
            return np.full(len(tokens), len(self.vocab.genes))
        if getattr(self.encoder, "include_zeros", False):
            n_genes = np.empty(len(tokens), np.int64)
            for file, cells in self.match.by_file(rows):
                n_genes[cells] = len(file.measured)
            return n_genes
        medians = getattr(self.encoder, "medians", None)
        if medians is None:
            return tokens.lengths
        # genes without a median are not read
        return np.diff(np.concatenate([[0], np.cumsum(~np.isnan(medians)[tokens.genes])])[tokens.indptr])

    def _view(self, tokens: Tokens, rows: IntArray, keys: IntArray) -> Batch | None:
        """Make views of cells at the depths of others, with the principal components of the whole cells."""
        if self.reference is None:
            return None
        keys = mix(keys, _VIEW)
        thinned = self.reference.at_other_depths(tokens, keys)
        sequences = self._encoded(self.encoder, thinned, rows, keys if self.training else None)
        coordinates = self.reference.coordinates(tokens, self.match, rows)
        return Batch.from_tokens(sequences, keys, {COLUMN: coordinates}, Measured.of(self.match, rows))

    def _whole(self, tokens: Tokens, rows: IntArray) -> Tokens:
        """Make the token sequences of cells with all their genes, not truncated."""
        encoder = replace(self.encoder, max_len=len(self.vocab) + self.encoder.n_specials)  # type: ignore[type-var]
        return self._encoded(encoder, tokens, rows)


def _taken(counts: CSR, rows: IntArray) -> CSR:
    """Return rows in the given order."""
    indptr, indices, data = take_rows(counts.indptr, rows, counts.indices, counts.data)
    return sparse.csr_matrix((data, indices, indptr), shape=(len(rows), counts.shape[1]))


def prefetched(make: Callable[[], Generator[T, None, None]], ahead: int = 4) -> Generator[T, None, None]:
    """Iterate in a background thread; its errors are raised in the calling thread.

    At most ``ahead`` items are made, or being made, beside the one in use.
    """
    items: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room, stopped = threading.Semaphore(ahead), threading.Event()

    def work() -> None:
        try:
            with closing(make()) as made:
                while room.acquire() and not stopped.is_set():
                    items.put((next(made), None))
        except BaseException as error:  # raised again in the thread that waits for items
            items.put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="scllm-prefetch")
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        room.release()
        thread.join()
