"""Save and restore the state of a run, atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from scllm.engine import ranks
from scllm.models.sharded import read_shards, write_shards
from scllm.models.storage import read_torch

__all__ = ["Checkpoints", "restore", "save", "writing"]

_STATE = "state.json"  # the last file of a folder of shards


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run: ``step-N.pt``, or a folder ``step-N`` if the weights are sharded.

    Parameters
    ----------
    folder
        Where they are.
    last
        Link to the newest one.
    keep
        Number of checkpoints to keep.
    """

    folder: Path
    last: Path
    keep: int = 2

    def newest_first(self) -> list[Path]:
        """List the complete checkpoints."""
        found = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            name = re.fullmatch(r"step-(\d+)(\.pt)?", path.name)
            if name is not None:
                found[int(name[1])] = path
        return [found[step] for step in sorted(found, reverse=True)]

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of complete weights; only the first rank calls this."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step}.pt"
        save(path, state)
        self._publish(path)

    def save_shards(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint of sharded weights, each rank its part; all ranks call this."""
        path, fresh = self.folder / f"step-{step}", self.folder / f".step-{step}.new"
        with writing(path):
            if ranks.rank() == 0:
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir(parents=True)
            ranks.wait_for_all()
            write_shards(fresh, tensors)
        if ranks.rank() == 0:
            with writing(path):
                (fresh / _STATE).write_text(json.dumps(state))
                shutil.rmtree(path, ignore_errors=True)
                fresh.replace(path)
            self._publish(path)
        ranks.wait_for_all()

    def read(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint of complete weights."""
        return read_torch(path)

    def read_shards(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read a checkpoint of sharded weights into ``tensors``, and return the rest; all ranks call this."""
        read_shards(path, tensors)
        return json.loads((path / _STATE).read_text())

    def _publish(self, path: Path) -> None:
        """Make ``last.pt`` name a checkpoint, and remove all but the newest."""
        fresh = self.last.with_name(f".{self.last.name}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(path.relative_to(self.last.parent))
        fresh.replace(self.last)
        for old in self.newest_first()[self.keep :]:
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a new file, flush it and rename it over the last checkpoint, which is kept if anything fails."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with writing(path), fresh.open("wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    fresh.replace(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn disk errors into one that names the file and says how to resume the run."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_of_the_disk(error):
            raise
        raise OSError(
            f"'{path}' could not be written ({error}). The last good checkpoint is unchanged. Free some disk space and "
            "call again with the same run_dir to resume."
        ) from error


def _is_of_the_disk(error: BaseException) -> bool:
    """Return whether an error comes from writing a file; torch's zip writer and safetensors hide it in their own."""
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error)
    return isinstance(error, OSError) or isinstance(error.__context__, OSError)


def restore(path: Path) -> dict[str, Any] | None:
    """Return the state that was saved last, or ``None`` if nothing has been saved yet."""
    return read_torch(path) if path.exists() else None
