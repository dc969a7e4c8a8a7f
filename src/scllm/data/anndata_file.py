"""Opening ``.h5ad`` and ``.zarr`` for reading, and the tables in them."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem

from scllm._typing import IntArray
from scllm.data.opened import opened

__all__ = ["AnnDataFile", "FileTables", "MemoryTables", "Tables", "is_array", "naming", "stamp"]

_opening = threading.RLock()


class AnnDataFile:
    """An ``.h5ad`` file or ``.zarr`` folder. Every process opens it for itself; it is pickled as its path.

    The handle stays open, so that a file that is deleted while it is read can be read to the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._root: Any = None
        self._arrays: dict[str, Any] = {}
        self._process = os.getpid()
        # opened here, so that a broken file is an error at once, and a file that is deleted later stays readable
        self._open()
        opened(self)

    @property
    def root(self) -> Any:
        """The open ``h5py.File`` or ``zarr.Group``."""
        with _opening:
            if self._root is None or self._process != os.getpid():
                self._open()
            return self._root

    def array(self, name: str, *, cache: int = 0) -> Any:
        """Open an array once, with a cache of ``cache`` bytes for decompressed HDF5 chunks."""
        root = self.root
        with _opening:
            if name not in self._arrays:
                node = root[name]
                self._arrays[name] = _with_cache(node, cache) if isinstance(node, h5py.Dataset) else node
            return self._arrays[name]

    def check_present(self, name: str) -> None:
        """Raise ``FileNotFoundError`` if a zarr array was deleted: missing chunks would silently be read as zeros."""
        folder = self.path / name
        if not isinstance(self.root, zarr.Group) or any((folder / m).exists() for m in ("zarr.json", ".zarray")):
            return
        raise FileNotFoundError(errno.ENOENT, "the array was deleted", str(folder))

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        with _opening:
            if isinstance(self._root, h5py.File):
                self._root.close()
            self._root, self._arrays = None, {}

    def _open(self) -> None:
        self._arrays, self._process = {}, os.getpid()
        if self.path.is_dir():
            self._root = zarr.open_group(self.path, mode="r", use_consolidated=False)
            return
        try:
            self._root = h5py.File(self.path)
        except OSError as error:
            raise OSError(
                f"Expected a complete .h5ad file, but '{self.path}' cannot be opened ({error}). It may be truncated "
                "or damaged: copy it again."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._root, self._arrays, self._process = state["path"], None, {}, os.getpid()


class Tables(Protocol):
    """``obs`` and ``var`` of one matrix."""

    var: pd.DataFrame

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        ...

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of ``obs``."""
        ...

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns of ``obs``, without the names of the cells."""
        ...


class MemoryTables:
    """Tables of an AnnData in memory."""

    def __init__(self, obs: pd.DataFrame, var: pd.DataFrame) -> None:
        # converted to plain frames, because those of a view are pickled together with their AnnData
        self._obs, self.var = pd.DataFrame(obs), pd.DataFrame(var)
        self.obs_names, self.obs_columns = self._obs.index, list(self._obs.columns)

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Take columns of ``obs``."""
        return self._obs[list(columns)].reset_index(drop=True)


class FileTables:
    """Tables of an opened file. ``obs`` is read when needed, because names take 70 MB for a million cells."""

    def __init__(self, file: AnnDataFile, *, var: str = "var") -> None:
        self._file = file
        self.var: pd.DataFrame = read_elem(file.root[var])
        self.obs_columns = [str(column) for column in file.root["obs"].attrs["column-order"]]

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        obs = self._file.root["obs"]
        return pd.Index(read_elem(obs[obs.attrs["_index"]]))

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns of ``obs``."""
        obs = self._file.root["obs"]
        rows = pd.RangeIndex(obs[obs.attrs["_index"]].shape[0])
        return pd.DataFrame({column: _column(obs[column]) for column in columns}, index=rows)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _column(node: Any) -> Any:
    """Read a column of ``obs``; anndata 0.7 wrote its categories to another place in an ``.h5ad``."""
    if not isinstance(node, h5py.Dataset) or "categories" not in node.attrs:
        return read_elem(node)
    categories = node.file[node.attrs["categories"]]
    ordered = bool(categories.attrs.get("ordered", False))
    return pd.Categorical.from_codes(node[:], read_elem(categories), ordered=ordered)


def is_array(node: Any) -> bool:
    """Whether a node of an opened file is a dense array rather than a group."""
    return isinstance(node, h5py.Dataset | zarr.Array)


@contextmanager
def naming(path: Path, rows: IntArray) -> Iterator[None]:
    """Turn any error while reading into an ``OSError`` that names the file and the rows."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        span = f"rows {rows.min()} to {rows.max()}" if len(rows) else "no rows"
        raise OSError(
            f"'{path}' could not be read ({span}): {error}. It may have changed since it was opened. Check whether it "
            "was moved or truncated, or whether its disk was disconnected, then call again."
        ) from error


def stamp(path: Path) -> str:
    """Hash size and modification times of a file, or of each file in a folder, as a key for caches."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file), *_times(file)) for file in files]
    return hashlib.blake2b(repr((str(path.absolute()), found)).encode(), digest_size=8).hexdigest()


def _times(file: Path) -> tuple[int, int, int]:
    """Return size and both times: one of the times changes even if a copy was given the time of its original."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _with_cache(dataset: h5py.Dataset, n_bytes: int) -> h5py.Dataset:
    """Reopen a dataset with a chunk cache that holds at least two of its chunks."""
    if dataset.chunks is None:
        return dataset
    n_bytes = max(n_bytes, 2 * int(np.prod(dataset.chunks)) * dataset.dtype.itemsize)
    access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
    access.set_chunk_cache(10007, n_bytes, 1.0)
    return h5py.Dataset(h5py.h5d.open(dataset.file.id, dataset.name.encode(), access))
