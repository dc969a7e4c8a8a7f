"""The processes that train together, and which of them this is."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

__all__ = ["joined", "rank", "sum_over_ranks", "tie_to_parent", "wait_for_all", "world"]

_PDEATHSIG = 1
_BUCKET = 32 * 2**20  # elements sent at once: large enough to fill the link, small enough to need little memory


def rank() -> int:
    """Number of this process, 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def wait_for_all() -> None:
    """Go on when every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Add up tensors over all processes, in place, in few large messages."""
    if world() == 1:
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(part.numel() for part in bucket) >= _BUCKET:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    distributed.all_reduce(flat)
    for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(summed.view_as(tensor))


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the other processes where torchrun started this one, and leave together."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    # torchrun stops its workers when it is asked to end, but not when it is killed
    tie_to_parent()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # a rank that is lost must end the others within minutes, not the default half hour
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def tie_to_parent() -> None:
    """End this process as soon as its parent is gone, however that ended (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)
