"""Downloading counts in parts that survive an interruption, and joining them in one file."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import zarr
from anndata import AnnData
from scipy import sparse

from scllm import _keys
from scllm._log import log, progress
from scllm._typing import CSR, IntArray
from scllm.data.run_files import read_json, write_json

__all__ = ["Download", "check_target", "in_parts"]

# cells of a part: some 100 MB of counts
PART = 8192
_SUFFIXES = (".h5ad", ".zarr")
# values in a chunk, which is compressed and read as one, and in a zarr shard, which is one file
_CHUNK, _SHARD = 2**16, 2**22


def check_target(out: str | os.PathLike[str]) -> Path:
    """Return the path of a file to write; raise if its format or its folder is not one."""
    path = Path(out).absolute()
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"Expected out to end in .h5ad or .zarr, got '{out}'. Add one of the two.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected out in an existing folder, but '{path.parent}' is not one. Create it.")
    return path


def in_parts(ids: IntArray) -> list[IntArray]:
    """Divide cells into parts of equal size; the last may be smaller."""
    return [ids[start : start + PART] for start in range(0, len(ids), PART)]


class Download:
    """A file that is being written: a folder of finished parts beside it, and what was asked for.

    Parameters
    ----------
    path
        The ``.h5ad`` or ``.zarr`` to write.
    asked
        What the caller asked for, as JSON. A folder of parts with other content is an error.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self.asked = path, {**asked, "cells_in_part": PART}
        self.folder = path.with_name(f"{path.name}.parts")

    def is_finished(self) -> bool:
        """Whether the file is there, and holds what was asked for; raise if it holds anything else."""
        if not self.path.exists():
            return False
        if _digest_in(self.path) != self.asked["digest"]:
            raise FileExistsError(
                f"Expected out to be a new file, or one with the same cells, but '{self.path}' holds others. Pass "
                "another path, or delete it."
            )
        shutil.rmtree(self.folder, ignore_errors=True)  # left if the process ended just after the last step
        return True

    def fetch(self, parts: list[IntArray], read: Callable[[IntArray], CSR]) -> None:
        """Read the counts of the parts that are not there yet."""
        self.folder.mkdir(exist_ok=True)
        self._check_asked()
        missing = [number for number in range(len(parts)) if not self._file(number).exists()]
        if len(missing) < len(parts):
            log.info("resuming: %d of %d parts are in '%s'", len(parts) - len(missing), len(parts), self.folder)
        for number in progress(missing, desc="downloading", unit="part"):
            _save(self._file(number), read(parts[number]))

    def join(self, adata: AnnData, n_parts: int) -> None:
        """Write the file from the tables of ``adata`` and the counts of all parts, and remove the parts."""
        fresh = self.folder / f"joined{self.path.suffix}"
        _remove(fresh)
        log.info("writing %d cells to '%s'", adata.n_obs, self.path)
        files = [self._file(number) for number in range(n_parts)]
        _write(fresh, adata, files)
        fresh.replace(self.path)
        shutil.rmtree(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.npz"

    def _check_asked(self) -> None:
        """Write down what was asked for, or compare it with what an interrupted call asked for."""
        file = self.folder / "asked.json"
        if not file.exists():
            write_json(file, self.asked)
            return
        before = read_json(file)
        differing = [name for name in {**self.asked, **before} if self.asked.get(name) != before.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"Expected the arguments of the interrupted call that left '{self.folder}', got another {name}: "
                f"{self.asked.get(name)!r} instead of {before.get(name)!r}. Pass the same arguments or another out=, "
                "or delete that folder."
            )


def _digest_in(path: Path) -> str | None:
    """Return the digest that :func:`scllm.datasets.census` wrote into a file, if it did."""
    try:
        root = h5py.File(path) if path.is_file() else zarr.open_group(path, mode="r")
    except (OSError, ValueError):  # another kind of file
        return None
    key = f"uns/{_keys.UNS}/census/params/digest"
    found = str(ad.io.read_elem(root[key])) if key in root else None
    if isinstance(root, h5py.File):
        root.close()
    return found


def _save(file: Path, matrix: CSR) -> None:
    """Write a part under another name and rename it, so that a part is complete or not there."""
    fresh = file.with_suffix(".new")
    with fresh.open("wb") as handle:
        sparse.save_npz(handle, matrix, compressed=False)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(file)


def _write(path: Path, adata: AnnData, files: list[Path]) -> None:
    """Write the tables of ``adata`` and, part by part, the counts."""
    root = zarr.open_group(path, mode="w", zarr_format=3) if path.suffix == ".zarr" else h5py.File(path, "w")
    with closing(root) if isinstance(root, h5py.File) else nullcontext(), warnings.catch_warnings():
        # anndata announces that it will write tables in shards too
        warnings.filterwarnings("ignore", "zarr v3 autosharding")
        ad.io.write_elem(root, "/", adata)
        if "X" in root:
            del root["X"]  # the place of a matrix that is not there
        _write_counts(root.create_group("X"), adata.shape, files)


def _write_counts(group: h5py.Group | zarr.Group, shape: tuple[int, int], files: list[Path]) -> None:
    """Write the counts of all parts below each other, as anndata lays out a CSR matrix."""
    group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(shape)})
    create = _compressed if isinstance(group, h5py.Group) else _sharded
    n_values = sum(map(_n_values, files))
    create(group, "data", n_values, np.float32)
    create(group, "indices", n_values, np.int32)
    create(group, "indptr", shape[0] + 1, np.int64)
    row = value = 0
    for part in progress(map(sparse.load_npz, files), desc="writing", total=len(files), unit="part"):
        values = slice(value, value + part.nnz)
        # the first end is the first start
        group["indptr"][row : row + part.shape[0] + 1] = part.indptr.astype(np.int64) + value
        group["indices"][values], group["data"][values] = part.indices, part.data
        row, value = row + part.shape[0], value + part.nnz


def _n_values(file: Path) -> int:
    with np.load(file) as stored:
        return int(stored["indptr"][-1])


def _compressed(group: h5py.Group, name: str, size: int, dtype: type) -> None:
    chunks = (min(_CHUNK, max(size, 1)),)
    group.create_dataset(name, (size,), dtype, chunks=chunks, compression="gzip", compression_opts=1, shuffle=True)


def _sharded(group: zarr.Group, name: str, size: int, dtype: type) -> None:
    group.create_array(name, shape=(size,), dtype=dtype, chunks=(_CHUNK,), shards=(_SHARD,))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
