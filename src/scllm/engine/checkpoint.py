"""Save and restore the state of a run, atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from scllm.models.storage import read_torch

__all__ = ["restore", "save", "writing"]


def save(path: Path, state: dict[str, Any]) -> None:
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
    # torch's zip writer reports a full disk as a RuntimeError, safetensors as its own error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"'{path}' could not be written ({error}). The last good checkpoint is unchanged. Free some disk space and "
            "call again with the same run_dir to resume."
        ) from error


def restore(path: Path) -> dict[str, Any] | None:
    """Return the state that was saved last, or ``None`` if nothing has been saved yet."""
    return read_torch(path) if path.exists() else None
