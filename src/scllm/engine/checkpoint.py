"""Saving and restoring the state of a run, atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from scllm.models.storage import read_torch

__all__ = ["restore", "save"]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write beside the last good file, flush, then rename over it; on any error the last good one stays."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
        fresh.replace(path)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as a RuntimeError
        fresh.unlink(missing_ok=True)
        kept = f"the last good checkpoint {path.name} is untouched" if path.exists() else "there is no earlier one"
        raise OSError(
            f"the checkpoint could not be written to {path} ({error}); {kept}. Make room on the disk and call again with "
            "the same run_dir to continue."
        ) from error


def restore(path: Path) -> dict[str, Any] | None:
    """The state that was saved last, ``None`` where there is none yet."""
    return read_torch(path) if path.exists() else None
