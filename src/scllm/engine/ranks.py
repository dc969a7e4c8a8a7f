"""Processes that train together: their number, the rank of this process, and communication."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = [
    "check_same",
    "gathered",
    "gathered_rows",
    "joined",
    "largest_over_ranks",
    "rank",
    "sum_over_ranks",
    "tie_to_parent",
    "wait_for_all",
    "wait_for_first",
    "world",
]

_PDEATHSIG = 1
# while one process works alone; if it is lost, its closed connection ends the others
_LONG = timedelta(days=7)

# group of all processes in which they wait for a long time
_patient: distributed.ProcessGroup | None = None


def rank() -> int:
    """Return the rank of this process; 0 if there is only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Wait until every process has reached this point."""
    if distributed.is_initialized():
        distributed.barrier()


def wait_for_first() -> None:
    """Wait until every process has reached this point, however long the first one works alone before it."""
    if distributed.is_initialized():
        distributed.barrier(group=_patient)


def check_same(values: Mapping[str, Any]) -> None:
    """Raise an error that names what differs if processes have different values."""
    if world() == 1:
        return
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, dict(values))
    for name, value in found[0].items():
        other = next((number for number, one in enumerate(found) if one[name] != value), None)
        if other is not None:
            raise RuntimeError(
                f"Expected all processes to have the same {name}, got {value} on rank 0 and {found[other][name]} on "
                f"rank {other}. Start them on the same run directory, in a folder that all machines share, with the "
                "same versions of scllm and torch."
            )


def sum_over_ranks(numbers: Tensor) -> None:
    """Sum a few numbers over all processes, in place."""
    if world() > 1:
        distributed.all_reduce(numbers)


def gathered(parts: list[Any]) -> list[Any]:
    """Return the parts of all processes, those of the first process first."""
    if world() == 1:
        return parts
    found: list[list[Any]] = [[]] * world()
    distributed.all_gather_object(found, parts)
    return [part for of_rank in found for part in of_rank]


def gathered_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, those of the first process first; their number may differ."""
    if world() == 1:
        return rows
    sizes = rows.new_zeros(world(), dtype=torch.int64)
    sizes[rank()] = len(rows)
    distributed.all_reduce(sizes)
    longest = int(sizes.max())
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    found = [torch.empty_like(padded) for _ in range(world())]
    distributed.all_gather(found, padded)
    return torch.cat([part[:size] for part, size in zip(found, sizes.tolist(), strict=True)])


def largest_over_ranks(number: Tensor) -> None:
    """Replace a number by the largest of all processes."""
    if world() > 1:
        distributed.all_reduce(number, distributed.ReduceOp.MAX)


@contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[None]:
    """Join the process group if torchrun started this process, and leave it together with the others.

    If an error is raised, print it and end the process at once. Leaving the group would wait for the others, which wait
    for this one.

    Parameters
    ----------
    device
        Device of this process.
    timeout
        Seconds after which a process that waits for another one ends.
    """
    global _patient
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    # torchrun stops its workers if it is terminated, but not if it is killed. They do not get SIGTERM then: a rank
    # would go on to a checkpoint, and might wait for others that are no longer there.
    tie_to_parent(signal.SIGKILL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    _patient = distributed.new_group(backend="gloo", timeout=_LONG)
    try:
        yield
        distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    distributed.destroy_process_group()


def tie_to_parent(number: signal.Signals) -> None:
    """Send this process a signal as soon as its parent ends, for whatever reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, number)
