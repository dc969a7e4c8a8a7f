"""What a run costs, said before it starts."""

from __future__ import annotations

import time

import torch

from scllm.engine.device import autocast
from scllm.models.base import CellModel

__all__ = ["flops_per_cell", "matrix_rate", "say_cost"]


def flops_per_cell(model: CellModel, n_tokens: float, *, training: bool = True) -> float:
    """Floating-point operations for a cell of ``n_tokens``; the backward pass costs twice the forward one."""
    return model.forward_flops(n_tokens) * (3 if training else 1)


def matrix_rate(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """Floating-point operations a second that matrix products reach here."""
    n = 4096 if device.type == "cuda" else 512
    a = torch.ones(n, n, device=device)
    done, began = 0, time.perf_counter()
    with torch.no_grad(), autocast(precision, device):
        while time.perf_counter() - began < seconds:
            a @ a
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += 1
    return done * 2 * n**3 / (time.perf_counter() - began)


def say_cost(model: CellModel, n_tokens: float, n_cells: int, device: torch.device, precision: str, n: int) -> str:
    """One line: operations a cell, and the time to expect at half the rate of plain matrix products."""
    each = flops_per_cell(model, n_tokens)
    seconds = 2 * each * n_cells / (matrix_rate(device, precision) * n)
    span = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    return f"{each / 1e9:.3g} GFLOP a cell of {n_tokens:.0f} tokens; {n_cells:,} cells take about {span}"
