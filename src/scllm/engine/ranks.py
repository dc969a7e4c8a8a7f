"""Processes that train together: their number, the rank of this process, and communication."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

__all__ = ["joined", "rank", "sum_over_ranks", "tie_to_parent", "wait_for_all", "world"]

_PDEATHSIG = 1


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


def sum_over_ranks(numbers: Tensor) -> None:
    """Sum a few numbers over all processes, in place."""
    if world() > 1:
        distributed.all_reduce(numbers)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the process group if torchrun started this process, and leave it together with the others."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    # torchrun stops its workers if it is terminated, but not if it is killed
    # not by SIGTERM, after which a rank goes on to a checkpoint, and may wait for others that are no longer there
    tie_to_parent(signal.SIGKILL)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # if a rank is lost, the others must end within minutes, not after the default half hour
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def tie_to_parent(number: signal.Signals) -> None:
    """Send this process a signal as soon as its parent ends, for whatever reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, number)
