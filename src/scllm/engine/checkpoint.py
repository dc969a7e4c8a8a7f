"""Saving and restoring the state of a run, atomically."""

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
    """Write beside the last good file, flush, then rename over it; on any error the last good one stays."""
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
    """Errors of the disk say what was written, and that the run can go on."""
    try:
        yield
    # the zip writer of torch reports a full disk as a RuntimeError, safetensors as its own
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}), room on the disk expected; the last good checkpoint is untouched. "
            "Make room and call again with the same run_dir to continue."
        ) from error


def restore(path: Path) -> dict[str, Any] | None:
    """The state that was saved last, ``None`` where there is none yet."""
    return read_torch(path) if path.exists() else None
