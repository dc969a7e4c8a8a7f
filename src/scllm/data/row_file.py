"""Arrays on disk that one or several processes write by rows, and that appear when all rows are there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from scllm._log import log
from scllm._typing import FloatArray
from scllm.data.replace import replaced_when_whole
from scllm.data.shared import locked

__all__ = ["BLOCK", "RowFile", "Share", "own_share", "rows_when_whole"]

# number of rows in one chunk of a .zarr
BLOCK = 16_384


@dataclass(frozen=True)
class Share:
    """The place of this process among those that share the rows of an array."""

    rank: int
    world: int

    def block(self, n_rows: int) -> int:
        """Rows of a chunk: fewer for a short array, so that every process has some."""
        return max(1, min(BLOCK, -(-n_rows // self.world)))

    def rows(self, n_rows: int) -> slice:
        """The rows of this process, whole chunks, because two processes cannot write to one."""
        block = self.block(n_rows)
        n_blocks = -(-n_rows // block)
        first, last = (n_blocks * rank // self.world for rank in (self.rank, self.rank + 1))
        return slice(min(first * block, n_rows), min(last * block, n_rows))


def own_share() -> Share:
    """Return the share of a process that torchrun or a scheduler started (``RANK`` of ``WORLD_SIZE``)."""
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if not 0 <= rank < world:
        raise ValueError(
            f"Expected RANK from 0 to {world - 1} with WORLD_SIZE={world}, got {rank}. Set both, or neither, in the "
            "environment of each process."
        )
    return Share(rank, world)


@dataclass(frozen=True)
class RowFile:
    """A ``.npy`` or ``.zarr`` of float32 that is written by rows.

    Parameters
    ----------
    path
        Where to write.
    n_rows
        Number of rows of all processes.
    block
        Rows of a chunk of a ``.zarr``.
    """

    path: Path
    n_rows: int
    block: int

    def write(self, start: int, values: FloatArray) -> None:
        """Write consecutive rows from ``start`` on; the first call of any process creates the file."""
        if not self.path.exists():
            with locked(self.path.with_name("creating"), fcntl.LOCK_EX):
                if not self.path.exists():
                    self._create(values.shape[1])
        if self.path.suffix == ".zarr":
            zarr.open_array(self.path, mode="r+")[start : start + len(values)] = values
            return
        # written and not mapped: mapped pages count as used memory, and two machines must not map the same one
        with self.path.open("r+b") as file:
            file.seek(self.path.stat().st_size - (self.n_rows - start) * values.shape[1] * values.itemsize)
            file.write(np.ascontiguousarray(values).data)

    def _create(self, width: int) -> None:
        """Create the file under another name, because others take it for complete once it is there."""
        shape, fresh = (self.n_rows, width), self.path.with_name(f"fresh{self.path.suffix}")
        if self.path.suffix == ".zarr":
            zarr.create_array(fresh, shape=shape, dtype="float32", chunks=(self.block, width), overwrite=True)
        else:
            np.lib.format.open_memmap(fresh, mode="w+", dtype=np.float32, shape=shape).flush()
        fresh.rename(self.path)


@contextmanager
def rows_when_whole(path: Path, n_rows: int, share: Share, key: str) -> Iterator[RowFile | None]:
    """Yield a file to which this process writes its rows; it is renamed to ``path`` when every process has done so.

    Several processes write to a hidden folder beside ``path``. They need not run at the same time, and if some of them
    fail, only those have to be started again: for a process that has already written its rows, ``None`` is yielded.

    Parameters
    ----------
    path
        A ``.npy`` or ``.zarr``. What was there is kept until it is replaced.
    n_rows
        Number of rows of all processes.
    share
        The share of this process.
    key
        What the rows depend on. Rows that were written for another key are removed.
    """
    if share.world == 1:
        with replaced_when_whole(path) as fresh:
            yield RowFile(fresh, n_rows, share.block(n_rows))
        return
    path = Path(os.path.realpath(path))
    folder, lock = path.with_name(f".{path.name}.parts"), path.with_name(f".{path.name}.lock")
    key = f"{share.world} {key}"
    done = folder / f"{share.rank}.done"
    with locked(lock, fcntl.LOCK_EX):
        if folder.exists() and (folder / "key").read_text() != key:
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        (folder / "key").write_text(key)
    yield None if done.exists() else RowFile(folder / path.name, n_rows, share.block(n_rows))
    with locked(lock, fcntl.LOCK_EX):
        if not folder.exists() or (folder / "key").read_text() != key:
            raise RuntimeError(
                f"Expected no other process to write '{path}', but another embedding was started in the meantime. "
                "Start all processes again."
            )
        done.touch()
        n_done = len(list(folder.glob("*.done")))
        log.info("finishing the rows of process %d; %d of %d processes are done", share.rank, n_done, share.world)
        if n_done == share.world:
            with replaced_when_whole(path) as fresh:
                (folder / path.name).rename(fresh)
            shutil.rmtree(folder)
            lock.unlink()
