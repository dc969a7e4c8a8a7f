"""Weights that are sharded over processes, in a folder of safetensors that any number of processes reads.

torch's own format for sharded checkpoints is not used, because reading it executes code in the file (pickle). torch
writes and reads safetensors too. That part of it takes a second to import, so it is imported where it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed

__all__ = ["all_shards", "read_shards", "write_shards"]


def write_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write each process' part of the tensors; all processes call this."""
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _without_warnings():
        checkpoint.save(_with_axis(tensors), storage_writer=writer, no_dist=not distributed.is_initialized())


def read_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read into tensors what any number of processes wrote; all processes call this."""
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    try:
        with _without_warnings():
            checkpoint.load(_with_axis(tensors), storage_reader=reader, no_dist=not distributed.is_initialized())
    except (checkpoint.CheckpointException, SafetensorError, OSError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"Expected complete shards of the weights in {folder}, but they cannot be read ({_last_line(error)}). They "
            "are truncated or damaged: use another checkpoint."
        ) from error


def all_shards(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, complete; this process alone."""
    from torch.distributed import checkpoint

    found = checkpoint.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in found.items()
        if isinstance(part, checkpoint.metadata.TensorStorageMetadata)
    }
    read_shards(folder, tensors)
    return tensors


def _with_axis(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give numbers an axis, because shards are slices; the results share memory with the tensors."""
    return {name: tensor.view(1) if tensor.ndim == 0 else tensor for name, tensor in tensors.items()}


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence torch's warning that a single process writes alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
