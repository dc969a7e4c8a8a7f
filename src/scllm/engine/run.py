"""A run is a directory: what is trained (``spec.json``), how far (``last.pt``), and the result (``model/``)."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scllm._log import log
from scllm.data.fingerprint import same_matrix
from scllm.data.run_files import read_history, read_json, write_json

__all__ = ["Run"]

# fields of the spec that may differ when a run is resumed
_FREE = ("versions", "processes", "data_reference", "data_stamp")
# training settings that may differ too, because the result does not depend on them, and others that may while a run has
# not finished
_FREE_SETTINGS = ("save_every", "log_every", "max_restarts", "compile", "checkpointing")
_CHANGEABLE_SETTINGS = ("lr", "clip", "precision")

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
        """Model, optimiser and step at the last checkpoint."""
        return self.path / "last.pt"

    @property
    def history(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "history.jsonl"

    @property
    def data(self) -> Path:
        """In-memory data as memory-mapped arrays, for the duration of the run."""
        return self.path / "data"

    @property
    def log(self) -> Path:
        """Output of the processes of a run."""
        return self.path / "log.txt"

    @property
    def is_done(self) -> bool:
        """Whether the final weights have been written."""
        return (self.path / "done").exists()

    @property
    def spec(self) -> dict[str, Any]:
        """The specification: model, data and settings."""
        spec = self.path / "spec.json"
        if not spec.is_file():
            raise FileNotFoundError(
                f"Expected a run directory, but '{self.path}' has no spec.json. Pass the run_dir of tl.pretrain or "
                "tl.finetune."
            )
        return read_json(spec)

    @property
    def cells(self) -> dict[str, NDArray[Any]]:
        """Rows of the training and validation cells, and columns for all rows."""
        with np.load(self.path / "cells.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    def create(self, spec: Mapping[str, Any], cells: Mapping[str, NDArray[Any]]) -> None:
        """Write the specification; ``spec.json`` comes last, so that an incomplete directory is no run."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "cells.npz").open("wb") as handle:
            np.savez(handle, **cells)  # type: ignore[arg-type]
        write_json(self.path / "spec.json", spec)

    def clear(self) -> None:
        """Remove the files of a run that could not be set up, and nothing else."""
        for folder in (self.model, self.data):
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("spec.json", ".spec.json.new", "cells.npz", ".lock"):
            (self.path / name).unlink(missing_ok=True)

    def resume_with(self, spec: Mapping[str, Any]) -> None:
        """Update the settings that may change, and where other processes find the data."""
        before = self.spec
        changed = [name for name in _CHANGEABLE_SETTINGS if spec["train"][name] != before["train"][name]]
        for name in changed:
            log.info("resuming with %s=%s (%s so far)", name, spec["train"][name], before["train"][name])
        taken = {name: spec[name] for name in ("train", "data_reference", "data_stamp")}
        if before | taken != before:
            write_json(self.path / "spec.json", before | taken)

    def is_new(self) -> bool:
        """Return whether nothing has been written here yet."""
        return not (self.path / "spec.json").is_file()

    def check(self, spec: Mapping[str, Any]) -> None:
        """Raise a ``ValueError`` that names the differences between a spec and the one in the directory."""
        # converted through JSON, because tuples come back as lists
        ours = _flat({k: v for k, v in json.loads(json.dumps(spec)).items() if k not in _FREE})
        theirs = _flat({k: v for k, v in self.spec.items() if k not in _FREE})
        settings = _FREE_SETTINGS if self.is_done else _FREE_SETTINGS + _CHANGEABLE_SETTINGS
        compared = {*ours, *theirs} - {f"train.{name}" for name in settings}
        different = sorted(name for name in compared if not _agree(name, ours.get(name), theirs.get(name)))
        if different:
            seen = "; ".join(
                f"{name} was {_cut(theirs.get(name))}, now {_cut(ours.get(name))}" for name in different[:6]
            )
            raise ValueError(
                f"Expected the settings of the run in '{self.path}', got others ({seen}). Pass the same settings to "
                "resume it, or another run_dir."
            )

    def table(self) -> pd.DataFrame | None:
        """Return the history so far."""
        return read_history(self.history)

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
                    f"Expected only one process to train in '{self.path}', but another one is running. Wait until it "
                    "has finished, or stop it."
                )
            time.sleep(0.1)
        with handle:
            yield handle.fileno()

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
        handle.close()
        return None


def _agree(name: str, ours: Any, theirs: Any) -> bool:
    if name == "data.fingerprint" and ours and theirs:
        return same_matrix(ours, theirs)
    return ours == theirs


def _cut(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix.removesuffix("."): content}
    return {name: value for key, part in content.items() for name, value in _flat(part, f"{prefix}{key}.").items()}
