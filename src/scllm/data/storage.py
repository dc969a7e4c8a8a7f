"""Count matrices in memory or on disk, read by rows as CSR."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, Protocol

import h5py
import numpy as np
from scipy import sparse

from scllm._typing import CSR, IntArray, Rows
from scllm.data.anndata_file import AnnDataFile, naming
from scllm.kernels.ragged import take_rows

__all__ = [
    "BLOCK",
    "DenseRows",
    "MemoryRows",
    "RowStore",
    "SelectedRows",
    "SparseRows",
    "csr",
    "positions",
    "runs",
    "stored_dtype",
]

# values held in memory beside the result while reading or rewriting: 4 million, 32 MB with their columns
BLOCK = 1 << 22
# one call to HDF5 takes as long as copying about this many values from its chunk cache
_BRIDGE = 4096


class RowStore(Protocol):
    """A matrix that is read by rows.

    ``chunked`` says whether reading single random rows is slow; ``chunk_rows`` is the number of consecutive rows that
    are best read together.
    """

    shape: tuple[int, int]
    dtype: np.dtype
    chunked: bool
    chunk_rows: int

    def read(self, rows: IntArray) -> CSR:
        """Read the rows in the given order; ``rows`` holds positions from 0 to ``shape[0] - 1``."""
        ...


class MemoryRows:
    """A CSR or dense matrix in memory. Only the rows that are read are copied."""

    chunked = False
    chunk_rows = 1

    def __init__(self, matrix: Any) -> None:
        self.shape, self.dtype = matrix.shape, stored_dtype(matrix.dtype)
        self._matrix = matrix
        self._is_canonical = bool(getattr(matrix, "has_canonical_format", True))

    @property
    def lengths(self) -> IntArray | None:
        """Number of values stored in each row; ``None`` for a dense matrix."""
        return np.diff(self._matrix.indptr) if sparse.issparse(self._matrix) else None

    def read(self, rows: IntArray) -> CSR:
        """Read rows in the given order."""
        matrix = self._matrix
        if not sparse.issparse(matrix):
            step = _dense_rows(self)
            return _stack((matrix[rows[start : start + step]] for start in range(0, len(rows), step)), self)
        indptr, indices, data = take_rows(matrix.indptr, rows, matrix.indices, matrix.data)
        return csr(indptr, indices, data, self, is_canonical=self._is_canonical)


class SparseRows:
    """A CSR group of an ``.h5ad`` or ``.zarr``.

    Rows are read in the order of the file, consecutive ones in one slice, so that each compressed chunk is decompressed
    only once. The requested order is restored in memory. ``indptr`` is kept in memory.
    """

    chunked = True

    def __init__(self, file: AnnDataFile, key: str) -> None:
        self.file, self.key, self.path = file, key, file.path
        group = file.root[key]
        self.indptr: IntArray = group["indptr"][:].astype(np.int64, copy=False)
        self.shape = (len(self.indptr) - 1, int(group.attrs["shape"][1]))
        self.dtype = stored_dtype(group["data"].dtype)
        chunk = _chunk_length(group["data"])
        per_row = max(1, self.indptr[-1] // max(1, self.shape[0]))
        # six storage chunks per read: the partly used chunks at both ends add about a sixth to what is decompressed
        self.chunk_rows = int(np.clip(6 * chunk // per_row, 64, 256))
        # zarr does not cache decompressed chunks, so two slices of one chunk would decompress it twice
        self._bridge = _BRIDGE if isinstance(group["data"], h5py.Dataset) else max(chunk, _BRIDGE)

    @property
    def lengths(self) -> IntArray:
        """Number of values stored in each row."""
        return np.diff(self.indptr)

    def read(self, rows: IntArray) -> CSR:
        """Read rows in the given order."""
        with naming(self.file.path, rows):
            indptr, indices, data = _in_order(self._read_ascending, rows)
        return csr(indptr, indices, data, self, is_canonical=False)

    def _read_ascending(self, rows: IntArray) -> tuple[IntArray, IntArray, np.ndarray]:
        starts, ends = self.indptr[rows], self.indptr[rows + 1]
        indptr = np.concatenate([[0], np.cumsum(ends - starts)])
        indices, data = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], self.dtype)
        for first, last in runs(starts, ends, self._bridge):
            out = slice(indptr[first], indptr[last])
            # the gaps between rows are treated as rows too, and only every second one is taken
            bounds = np.stack([starts[first:last], ends[first:last]], axis=1).ravel() - starts[first]
            for name, target in (("indices", indices), ("data", data)):
                values = self._slice(name, starts[first], ends[last - 1])
                if len(values) == out.stop - out.start:
                    target[out] = values
                else:
                    wanted = np.arange(0, len(bounds), 2)
                    target[out] = take_rows(bounds, wanted, values.astype(target.dtype, copy=False))[1]
        return indptr, indices, data

    def _slice(self, name: str, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.empty(0, np.int32)
        array = self.file.array(f"{self.key}/{name}", cache=1 << 23)
        values = array[int(start) : int(stop)]
        self.file.check_present(f"{self.key}/{name}")
        return values


class DenseRows:
    """A dense array of an ``.h5ad`` or ``.zarr``, converted to CSR a few rows at a time."""

    chunked = True

    def __init__(self, file: AnnDataFile, key: str) -> None:
        self.file, self.key, self.path = file, key, file.path
        array = file.root[key]
        self.shape, self.dtype = array.shape, stored_dtype(array.dtype)
        height = array.chunks[0] if array.chunks else 1
        self.chunk_rows = int(np.clip(height, 64, 256))
        # room for one band of chunks, so that the next slice of the same rows need not decompress them again
        self._cache = min(2 * height * self.shape[1] * array.dtype.itemsize, 1 << 28)
        self._bridge = 0 if isinstance(array, h5py.Dataset) else height

    def read(self, rows: IntArray) -> CSR:
        """Read rows in the given order."""
        with naming(self.file.path, rows):
            indptr, indices, data = _in_order(self._read_ascending, rows)
        return csr(indptr, indices, data, self, is_canonical=True)

    def _read_ascending(self, rows: IntArray) -> tuple[IntArray, IntArray, np.ndarray]:
        bands = runs(rows, rows + 1, self._bridge, _dense_rows(self))
        block = _stack((self._dense(rows[first:last]) for first, last in bands), self)
        return block.indptr, block.indices, block.data

    def _dense(self, rows: IntArray) -> np.ndarray:
        values = self.file.array(self.key, cache=self._cache)[int(rows[0]) : int(rows[-1]) + 1]
        self.file.check_present(self.key)
        return values if len(values) == len(rows) else values[rows - rows[0]]


class SelectedRows:
    """A view of some rows and columns of another store."""

    def __init__(self, store: RowStore, rows: IntArray | None, columns: IntArray | None) -> None:
        self._store, self._rows, self._columns = store, rows, columns
        n_rows, n_columns = store.shape
        self.shape = (n_rows if rows is None else len(rows), n_columns if columns is None else len(columns))
        self.dtype, self.chunked, self.chunk_rows = store.dtype, store.chunked, store.chunk_rows

    def read(self, rows: IntArray) -> CSR:
        """Read rows in the given order."""
        block = self._store.read(rows if self._rows is None else self._rows[rows])
        if self._columns is None:
            return block
        block = block[:, self._columns]
        block.sort_indices()
        return block


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype of rows that are read: as stored, in native byte order; half precision becomes float32."""
    if dtype.kind not in "biuf":
        raise TypeError(f"Expected a matrix of numbers, got {dtype}. Store counts as integers or floats.")
    return np.dtype(np.float32) if dtype == np.float16 else dtype.newbyteorder("=")


def positions(rows: Rows, n_obs: int) -> IntArray:
    """Convert any numpy index of rows to positions from 0 to ``n_obs - 1``."""
    if isinstance(rows, slice):
        return np.arange(*rows.indices(n_obs))
    cells = np.asarray(rows)
    if cells.dtype == bool and cells.shape == (n_obs,):
        return np.flatnonzero(cells)
    if cells.size == 0:
        return np.empty(0, np.int64)
    if cells.ndim != 1 or cells.dtype.kind not in "iu":
        raise TypeError(
            f"Expected rows as a one-dimensional array of integers, a slice, or a mask of length {n_obs}, got "
            f"{cells.dtype} of shape {cells.shape}. Pass positions of cells; adata.obs_names.get_indexer(names) finds "
            "those of names."
        )
    if cells.min() < -n_obs or cells.max() >= n_obs:
        raise IndexError(
            f"Expected rows from {-n_obs} to {n_obs - 1} of {n_obs} cells, got {cells.min()} to {cells.max()}. Leave "
            "out rows that do not exist, and count from 0."
        )
    return np.where(cells < 0, cells + n_obs, cells).astype(np.int64)


def csr(indptr: IntArray, indices: IntArray, data: np.ndarray, store: RowStore, *, is_canonical: bool) -> CSR:
    """Make a CSR matrix of the rows read, and bring it into canonical form unless the store guarantees it."""
    if indptr[-1] < np.iinfo(np.int32).max:
        indptr, indices = indptr.astype(np.int32, copy=False), indices.astype(np.int32, copy=False)
    data = data.astype(store.dtype, copy=False)
    matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, store.shape[1]))
    if is_canonical:
        matrix.has_canonical_format = True
    else:
        matrix.sum_duplicates()
    return matrix


def _dense_rows(store: RowStore) -> int:
    """Number of rows that are held as a dense block at a time."""
    return max(1, BLOCK // max(1, store.shape[1]))


def _stack(blocks: Iterable[np.ndarray], store: RowStore) -> CSR:
    """Convert dense blocks of rows to CSR, one block after the other."""
    parts = [sparse.csr_matrix(np.asarray(block).astype(store.dtype, copy=False)) for block in blocks]
    empty = sparse.csr_matrix((0, store.shape[1]), dtype=store.dtype)
    return parts[0] if len(parts) == 1 else sparse.vstack([empty, *parts], format="csr")


def _in_order(read_ascending: Callable[[IntArray], tuple], rows: IntArray) -> tuple:
    """Read each row once in ascending order, then repeat and reorder rows in memory as requested."""
    if (np.diff(rows) > 0).all():
        return read_ascending(rows)
    ascending, asked = np.unique(rows, return_inverse=True)
    indptr, *arrays = read_ascending(ascending)
    return take_rows(indptr, asked, *arrays)


def runs(starts: IntArray, ends: IntArray, bridge: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Group rows to read in one slice, as (first, one past the last).

    Gaps between the rows of a group are at most ``bridge`` values, and all of them start in the same ``block``.
    """
    is_cut = (starts[1:] - ends[:-1] > bridge) | (np.diff(starts // block) > 0)
    cuts = [0, *(np.flatnonzero(is_cut) + 1).tolist(), len(starts)]
    return ((first, last) for first, last in pairwise(cuts) if first < last)


def _chunk_length(array: Any) -> int:
    return array.chunks[0] if array.chunks else 1
