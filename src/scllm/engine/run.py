"""A run is a directory: what is trained (``spec.json``), how far (``last.pt``), and the result (``model/``)."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pandas as pd

from scllm._log import log
from scllm.data.run_files import read_history, read_json, write_json
from scllm.engine.spec import Cells, RunSpec
from scllm.models.base import CellModel

__all__ = ["Run"]

# seconds that the processes of a run that has just been killed may need to end
_PATIENCE = 5.0


@dataclass(frozen=True)
class Run:
    """A run directory.

    Parameters
    ----------
    path
        The directory.
    """

    path: Path

    @property
    def model(self) -> Path:
        """The model: the initial one, and after the run the one with the best validation loss."""
        return self.path / "model"

    @property
    def best(self) -> Path:
        """The weights with the best validation loss, as a plain state dict."""
        return self.path / "best_model.pt"

    @property
    def last(self) -> Path:
        """Link to the newest checkpoint: model, optimiser and step."""
        return self.path / "last.pt"

    @property
    def checkpoints(self) -> Path:
        """The newest checkpoints."""
        return self.path / "checkpoints"

    @property
    def history(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "history.jsonl"

    @property
    def data(self) -> Path:
        """In-memory data as memory-mapped arrays, for the duration of the run."""
        return self.path / "data"

    @property
    def max_tokens(self) -> Path:
        """Largest number of tokens in a micro-batch, if memory has run out with more."""
        return self.path / "max_tokens"

    @property
    def log(self) -> Path:
        """Output of the processes of a run."""
        return self.path / "log.txt"

    @property
    def unstarted(self) -> Path:
        """Exists as long as the initial model has no weights from the data yet."""
        return self.path / "unstarted"

    @property
    def reference(self) -> Path:
        """Principal components of the cells, for relational pretraining."""
        return self.path / "reference.npz"

    @property
    def is_done(self) -> bool:
        """Whether the final weights have been written."""
        return (self.path / "done").exists()

    @property
    def spec(self) -> RunSpec:
        """The specification: model, data and settings."""
        spec = self.path / "spec.json"
        if not spec.is_file():
            raise FileNotFoundError(
                f"Expected a run directory, but '{self.path}' has no spec.json. Pass the run_dir of tl.pretrain or "
                "tl.finetune."
            )
        return RunSpec.from_json(read_json(spec))

    @property
    def cells(self) -> Cells:
        """Training and validation cells."""
        return Cells.load(self.path / "cells.npz")

    def create(self, spec: RunSpec, cells: Cells) -> None:
        """Write the specification; ``spec.json`` comes last, so that an incomplete directory is no run."""
        self.path.mkdir(parents=True, exist_ok=True)
        cells.save(self.path / "cells.npz")
        write_json(self.path / "spec.json", spec.to_json())

    def clear(self) -> None:
        """Remove the files of a run that could not be set up, and nothing else."""
        for folder in (self.model, self.data):
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("spec.json", ".spec.json.new", "cells.npz", "reference.npz", ".lock", ".lock-owner", "unstarted"):
            (self.path / name).unlink(missing_ok=True)

    def resume_with(self, spec: RunSpec) -> None:
        """Update the settings that may change, and where other processes find the data."""
        before = self.spec
        for name in before.changed_settings(spec):
            new, old = getattr(spec.train, name), getattr(before.train, name)
            log.info("resuming with %s=%s (%s so far)", name, new, old)
        after = before.with_changes_of(spec)
        if after != before:
            write_json(self.path / "spec.json", after.to_json())

    def is_new(self) -> bool:
        """Return whether nothing has been written here yet."""
        return not (self.path / "spec.json").is_file()

    def check(self, spec: RunSpec) -> None:
        """Raise a ``ValueError`` that names the differences between a spec and the one in the directory."""
        spec.check_resumes(self.spec, self.path, finished=self.is_done)

    def table(self) -> pd.DataFrame | None:
        """Return the history so far."""
        return read_history(self.history)

    def replace_model(self, model: CellModel) -> None:
        """Write another model in place of the one that is there."""
        fresh = self.path / ".model"
        shutil.rmtree(fresh, ignore_errors=True)
        model.save(fresh)
        # file by file, so that a complete model folder exists whenever this process is killed
        for file in fresh.iterdir():
            file.replace(self.model / file.name)
        fresh.rmdir()

    def finish(self) -> None:
        """Mark the run as done, after the final weights have been written."""
        (self.path / "done").write_text("")

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Let only one process train here at a time; the lock is released when the process ends, for whatever reason.

        Yields the descriptor of the locked file: a child process that inherits it keeps the lock if this process is
        killed.
        """
        end = time.monotonic() + _PATIENCE
        while (handle := self._lock()) is None:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"Expected only one process to train in '{self.path}', but another one is running"
                    f"{self._owned_by()}. Wait until it has finished, or stop it."
                )
            time.sleep(0.1)
        try:
            yield handle.fileno()
        finally:
            handle.close()
            self._owner.unlink(missing_ok=True)

    @property
    def _owner(self) -> Path:
        """Names the machine and process that hold the lock, where the file system knows no locks."""
        return self.path / ".lock-owner"

    def _lock(self) -> IO[str] | None:
        """Open and lock the lock file; return ``None`` if another process holds it or has just removed it."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / ".lock"
        handle = file.open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(file.stat(), os.fstat(handle.fileno())):
                return handle
        except BlockingIOError:
            pass
        except OSError as error:
            # some network file systems have no locks
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                raise
            if self._take_ownership():
                return handle
        handle.close()
        return None

    def _owned_by(self) -> str:
        """Name the owner for a message, if a file does."""
        if not self._owner.is_file():
            return ""
        host, _, number = self._owner.read_text().partition(" ")
        return f" (process {number} on {host}; if it has ended, remove '{self._owner}')"

    def _take_ownership(self) -> bool:
        """Create the file that names the owner; return ``False`` if another process that still runs has done so."""
        try:
            with self._owner.open("x") as owner:
                owner.write(f"{socket.gethostname()} {os.getpid()}")
            return True
        except FileExistsError:
            host, _, number = self._owner.read_text().partition(" ")
        if host == socket.gethostname() and number.isdigit() and not _is_running(int(number)):
            self._owner.unlink(missing_ok=True)
        return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
