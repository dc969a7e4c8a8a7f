"""Choice of device and precision, with a clear error if they are not available."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import get_args

import torch

from scllm.engine.config import Precision

__all__ = ["DTYPES", "autocast", "check_gpus", "check_number", "resolve_device", "resolve_precision"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str = "auto") -> torch.device:
    """Choose the device; under torchrun, each process uses the GPU of its local rank."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda"):
        device = _of_this_process(device)
    unknown = ValueError(f"Expected device to be 'auto', 'cpu' or 'cuda', got {device!r}. Pass one of them.")
    if device != "cpu" and not device.startswith("cuda"):
        raise unknown
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise unknown from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"Expected a GPU for device={device!r}, but torch {torch.__version__} finds none. Use device='cpu' or "
            "'auto'."
        )
    return chosen


def _of_this_process(device: str) -> str:
    """Return the GPU of this process under torchrun; raise if another process would use the same one."""
    n_processes, available = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if n_processes > 1 and (device != "cuda" or 0 < available < n_processes):
        raise ValueError(
            f"Expected a GPU for each of the {n_processes} processes on this machine, got device={device!r} with "
            f"{available} GPU{'s' if available != 1 else ''}. Start one process for each GPU, with device='cuda'."
        )
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def check_number(name: str, n: int) -> int:
    """Return a number of processes or GPUs as a plain integer; raise unless it is a whole number of at least 1."""
    if isinstance(n, bool) or not isinstance(n, Integral):
        raise TypeError(f"Expected {name} to be a whole number, got {n!r}. Leave it out to use the default.")
    if n < 1:
        raise ValueError(f"Expected {name} of at least 1, got {n}. Leave it out to use the default.")
    return int(n)


def check_gpus(n_gpus: int) -> None:
    """Raise an error if this machine has fewer GPUs than requested."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if check_number("n_gpus", n_gpus) > available:
        advice = "Leave n_gpus out, and pass device='cpu'." if available == 0 else f"Use n_gpus={available}."
        raise ValueError(f"Expected n_gpus of at most {available}, the GPUs of this machine, got {n_gpus}. {advice}")


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """Choose the precision; ``"auto"`` is fp32 on a CPU, bf16 on a GPU that supports it, and fp16 on older GPUs."""
    if precision not in get_args(Precision):
        raise ValueError(f"Expected precision to be one of {get_args(Precision)}, got {precision!r}. Pass one of them.")
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Run matrix products in the given precision; do nothing for fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=DTYPES[precision])
