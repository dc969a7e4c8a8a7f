"""Estimates of what a run reads and how long it takes, made before it starts."""

from __future__ import annotations

import time
from contextlib import closing
from functools import cache

import numpy as np
import torch

from scllm._typing import IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.engine.device import autocast
from scllm.engine.loader import Loader
from scllm.models.base import CellModel

__all__ = ["cells_in_words", "device_in_words", "expected_seconds", "flops_per_cell", "mean_tokens"]

# number of cells in which tokens are counted
_SOME = 64
# seconds per cell besides the matrix products of the model: reading, encoding, small operations
_OVERHEAD = 5e-4


def flops_per_cell(model: CellModel, n_tokens: float, *, training: bool = True) -> float:
    """Estimate floating-point operations per cell of ``n_tokens``; a backward pass costs two forward passes."""
    return model.forward_flops(n_tokens) * (3 if training else 1)


def mean_tokens(model: CellModel, source: CellSource, match: GeneMatch, rows: IntArray) -> float:
    """Estimate the mean number of tokens per cell, special tokens included, from a few cells spread over ``rows``."""
    if not len(rows):
        return 0.0
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(_SOME, len(rows))).astype(np.int64))]
    cells = Loader(source, some, match, model.encoder, model.vocab, len(some), training=False)
    with closing(cells.epoch(0)) as read:
        return sum(sum(batch.lengths) for batch in next(read)) / len(some)


@cache
def _matrix_rate(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """Measure the floating-point operations per second of matrix products on this device, once per process."""
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


def expected_seconds(flops: float, n_cells: int, device: torch.device, precision: str, n: int = 1) -> float:
    """Estimate the time for ``flops`` and ``n_cells`` on ``n`` devices, at half the rate of plain matrix products."""
    return (2 * flops / _matrix_rate(device, precision) + _OVERHEAD * n_cells) / n


def cells_in_words(n_cells: int, source: CellSource, match: GeneMatch, n_tokens: float) -> str:
    """Describe the cells: how many, from which matrix, with how many matched genes and tokens."""
    matrix = "X" if source.layer is None else f"layer {source.layer!r}"
    genes = f"{match.n_matched:,} of {len(match.token_ids):,} genes matched"
    return f"{n_cells:,} cells ({matrix}, {genes}, {n_tokens:,.0f} tokens a cell)"


def device_in_words(device: torch.device, n: int = 1) -> str:
    """Name the device (``the CPU``, ``cuda:0``), or the number of devices."""
    if n > 1:
        return f"{n} GPUs" if device.type == "cuda" else f"{n} CPU processes"
    return "the CPU" if device.type == "cpu" else str(device)
