"""Which device and which precision, and a clear error where they are not to be had."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import get_args

import torch

from scllm.engine.config import Precision

__all__ = ["autocast", "check_gpus", "resolve_device", "resolve_precision"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str = "auto") -> torch.device:
    """The device to use; under torchrun each process takes the GPU of its local rank."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f"device is {device!r}, 'auto', 'cpu' or 'cuda' expected. Pass one of those.")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, 'auto', 'cpu' or 'cuda' expected. Pass one of those.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {device!r}, and torch {torch.__version__} sees no GPU. Use device='cpu' or 'auto'."
        )
    return chosen


def check_gpus(n_gpus: int) -> None:
    """Raise where fewer GPUs are there than asked for."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus < 1:
        raise ValueError(f"n_gpus is {n_gpus}, at least 1 expected. Leave it out to have it chosen.")
    if n_gpus > there:
        advice = "Leave n_gpus out, and pass device='cpu'." if there == 0 else f"Use n_gpus={there}."
        raise ValueError(f"n_gpus is {n_gpus}, this machine has {there}. {advice}")


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """``"auto"``: fp32 on a CPU, bf16 on a GPU that has it, fp16 on older ones."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, one of {get_args(Precision)} expected. Pass one of those.")
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Run matrix products in a lower precision; nothing for fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=_DTYPES[precision])
