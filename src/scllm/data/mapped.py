"""Memory-mapped CSR arrays in a folder, written from any source or from a matrix that is stored by columns."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from scllm._log import log
from scllm._typing import CSR, IntArray
from scllm.data.anndata_file import AnnDataFile, naming, stamp
from scllm.data.shared import shared_folder
from scllm.data.storage import BLOCK, csr, runs, stored_dtype
from scllm.kernels.ragged import take_rows

__all__ = ["MappedRows", "TransposedRows", "write_rows"]

_rewriting = threading.Lock()


class MappedRows:
    """CSR arrays in a folder (``indptr.npy``, ``indices.npy``, ``data.npy``), mapped into memory.

    Processes on one machine share one copy, and reading random rows is as fast as in memory.
    """

    chunked = False
    chunk_rows = 1

    def __init__(self, folder: Path, n_genes: int, *, is_canonical: bool = True) -> None:
        self.folder, self.path, self._is_canonical = folder, folder, is_canonical
        self.indptr: IntArray = np.load(folder / "indptr.npy")
        self.shape = (len(self.indptr) - 1, n_genes)
        self._map()
        self.dtype = self._data.dtype

    @property
    def lengths(self) -> IntArray:
        """Number of values stored in each row."""
        return np.diff(self.indptr)

    def read(self, rows: IntArray) -> CSR:
        """Read rows in the given order."""
        with naming(self.folder, rows):
            # reading pages beyond the end of a file kills the process, so a truncated file must be noticed before
            for array in (self._indices, self._data):
                if array.base.size() < array.offset + array.nbytes:
                    raise OSError(errno.EIO, "the file is shorter than when it was opened", str(array.filename))
            indptr, indices, data = take_rows(self.indptr, rows, np.asarray(self._indices), np.asarray(self._data))
        return csr(indptr, indices, data, self, is_canonical=self._is_canonical)

    def _map(self) -> None:
        self._indices: Any = _mapped(self.folder / "indices.npy")
        self._data: Any = _mapped(self.folder / "data.npy")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": None, "_data": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


class TransposedRows:
    """A CSC group of an ``.h5ad`` or ``.zarr``, rewritten by rows on the first read.

    Columns are streamed, so little memory is needed. The copy is temporary: it is written once for all processes and
    all sources that read the file, and removed when the last of these processes ends.
    """

    chunked = False
    chunk_rows = 1

    def __init__(self, file: AnnDataFile, key: str) -> None:
        self.file, self.key, self.path = file, key, file.path
        group = file.root[key]
        self.shape = (int(group.attrs["shape"][0]), int(group.attrs["shape"][1]))
        self.dtype = stored_dtype(group["data"].dtype)
        self._name = f"rows-{stamp(file.path)}-{key.encode().hex()}"
        self._rows: MappedRows | None = None

    def read(self, rows: IntArray) -> CSR:
        """Read rows in the given order."""
        if not len(rows):
            return sparse.csr_matrix((0, self.shape[1]), dtype=self.dtype)
        with _rewriting:
            if self._rows is None:
                self._rows = MappedRows(shared_folder(self._name, self._write), self.shape[1], is_canonical=False)
            mapped = self._rows
        return mapped.read(rows)

    def close(self) -> None:
        """Close the copy; the next read opens it again."""
        self._rows = None

    def _write(self, folder: Path) -> None:
        group = self.file.root[self.key]
        n_values, size = group["data"].shape[0], 4 + self.dtype.itemsize
        # mapped files are allocated lazily, so a full disk would kill the process instead of raising an error
        if (free := shutil.disk_usage(folder).free) < n_values * size:
            raise OSError(
                f"Expected {n_values * size / 1e9:.1f} GB of free space in '{folder.parent}' to rewrite "
                f"'{self.file.path}', which is stored by columns, by rows, got {free / 1e9:.1f} GB. Set TMPDIR to a "
                "folder on a larger disk, or store the matrix as CSR."
            )
        log.info(
            "rewriting '%s' of %s, which is stored by columns, by rows in %s", self.key, self.file.path, folder.parent
        )
        with naming(self.file.path, np.array([0, self.shape[0] - 1])):
            _transpose(group, folder, self.shape, self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}


def write_rows(blocks: Iterator[CSR], folder: Path) -> None:
    """Write CSR blocks one after the other as the files that :class:`MappedRows` opens."""
    lengths = [np.zeros(1, np.int64)]
    with open(folder / "indices.npy", "wb") as indices, open(folder / "data.npy", "wb") as data:
        dtype = None
        for block in blocks:
            if dtype is None:
                dtype = block.data.dtype
                _write_header(indices, np.dtype(np.int32), 0)
                _write_header(data, dtype, 0)
            lengths.append(np.diff(block.indptr).astype(np.int64))
            indices.write(block.indices.astype(np.int32, copy=False).data)
            data.write(block.data.astype(dtype, copy=False).data)
        indptr = np.cumsum(np.concatenate(lengths))
        assert dtype is not None
        # numpy leaves room in the header for a longer first axis, so it can be rewritten in place
        _write_header(indices, np.dtype(np.int32), indptr[-1])
        _write_header(data, dtype, indptr[-1])
    np.save(folder / "indptr.npy", indptr)


def _mapped(path: Path) -> np.memmap:
    array = np.load(path, mmap_mode="r")
    if not isinstance(array, np.memmap):
        raise OSError(
            f"Expected an array that can be mapped into memory in '{path}'. Write the folder again with `write_arrays`."
        )
    return array


def _write_header(file: Any, dtype: np.dtype, length: int) -> None:
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (int(length),)}
    np.lib.format.write_array_header_1_0(file, header)


def _transpose(group: Any, folder: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Write the rows of a CSC group, streaming its columns twice: first to count values, then to place them."""
    n_values = group["data"].shape[0]
    counts = np.zeros(shape[0], np.int64)
    for start in range(0, n_values, BLOCK):
        counts += np.bincount(group["indices"][start : start + BLOCK], minlength=shape[0])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    np.save(folder / "indptr.npy", indptr)
    indices = np.lib.format.open_memmap(folder / "indices.npy", mode="w+", dtype=np.int32, shape=(n_values,))
    data = np.lib.format.open_memmap(folder / "data.npy", mode="w+", dtype=dtype, shape=(n_values,))
    free = indptr[:-1].copy()  # (n_rows,) position of each row's next value
    starts = group["indptr"][:].astype(np.int64)
    for first, last in runs(starts[:-1], starts[1:], bridge=0):
        span = slice(int(starts[first]), int(starts[last]))
        values, rows = group["data"][span].astype(dtype, copy=False), group["indices"][span]
        columns = starts[first : last + 1] - span.start
        block = sparse.csc_matrix((values, rows, columns), shape=(shape[0], last - first)).tocsr()
        n_new = np.diff(block.indptr)
        place = np.repeat(free - block.indptr[:-1], n_new) + np.arange(block.nnz)
        indices[place], data[place] = block.indices + first, block.data
        free += n_new
