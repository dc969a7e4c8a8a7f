"""Estimates of what a run reads and how long it takes, and the operations of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import cache

import numpy as np
import torch

from scllm._typing import IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.engine.device import DTYPES
from scllm.engine.loader import Loader
from scllm.engine.objectives import GeneLabel, Label, Objective
from scllm.models.base import Batch, CellModel

__all__ = [
    "cells_in_words",
    "device_in_words",
    "expected_seconds",
    "flops_per_cell",
    "matrix_rate",
    "mean_tokens",
    "training_flops",
]

# number of cells in which tokens are counted
_SOME = 64
# seconds per cell besides the matrix products of the model: reading, encoding, small operations
_OVERHEAD = 5e-4


def flops_per_cell(model: CellModel, n_tokens: float, *, training: bool = True) -> float:
    """Estimate floating-point operations per cell of ``n_tokens``; a backward pass costs two forward passes."""
    return model.forward_flops(n_tokens) * (3 if training else 1)


def training_flops(model: CellModel, objective: Objective) -> Callable[[Batch], float] | None:
    """Return a function that counts the floating-point operations of training on a batch and its view.

    Operations of the blocks count, with attention over the real length of each cell; embedding tables, prediction
    heads, padding and recomputation do not. ``None`` if they cannot be counted: two streams of hidden states (XLNet),
    networks of transformers with blocks of their own (``hf_config``), and heads that do not read all blocks.
    """
    reads_no_block = isinstance(objective, Label) and any(head.reads == "inputs" for head in model.head_specs)
    # heads of this family do not read the decoder, which `forward_flops` includes
    skips_decoder = isinstance(objective, Label | GeneLabel) and model.reads_depth
    has_other_blocks = getattr(model.config, "hf_config", None) is not None or model.likelihood == "permutation"
    if reads_no_block or skips_decoder or has_other_blocks:
        return None
    passes, share = _passes(model), getattr(objective, "share_read", 1.0)

    @cache
    def of_cell(n_tokens: float) -> float:
        return passes * model.forward_flops(n_tokens)

    def of_batch(batch: Batch) -> float:
        of_view = 0.0 if batch.view is None else sum(map(of_cell, batch.view.lengths))
        return sum(of_cell(share * n) for n in batch.lengths) + of_view

    return of_batch


def _passes(model: CellModel) -> float:
    """Count passes through the blocks: one forward, and one each for gradients of hidden states and of weights."""
    within = {id(weight) for part in (*model.blocks, model.heads) for weight in part.parameters()}
    # the backward pass ends at the embeddings, or else at the first block with a weight that is trained
    reaches = any(weight.requires_grad and id(weight) not in within for weight in model.parameters())
    passes = 0.0
    for block in model.blocks:
        n_weights = sum(weight.numel() for weight in block.parameters())
        trained = sum(weight.numel() for weight in block.parameters() if weight.requires_grad)
        reaches = reaches or trained > 0
        passes += 1 + reaches + trained / max(n_weights, 1)
    return passes / max(len(model.blocks), 1)


def mean_tokens(model: CellModel, source: CellSource, match: GeneMatch, rows: IntArray) -> float:
    """Estimate the mean number of tokens per cell, special tokens included, from a few cells spread over ``rows``."""
    if not len(rows):
        return 0.0
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(_SOME, len(rows))).astype(np.int64))]
    cells = Loader(source, some, match, model.encoder, model.vocab, len(some), training=False)
    with closing(cells.epoch(0)) as read:
        return sum(sum(batch.lengths) for batch in next(read)) / len(some)


@cache
def matrix_rate(device: torch.device, precision: str, seconds: float = 0.15) -> float:
    """Measure the floating-point operations per second of matrix products on this device, once per process.

    On a CPU it is the rate of all threads of this process, while other processes do what they do.
    """
    n, n_at_once = (4096, 8) if device.type == "cuda" else (512, 1)
    # of random numbers, because products of constants need less power and are faster on a GPU
    drawn = torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(0))
    a = drawn.to(DTYPES.get(precision, torch.float32))
    out = a @ a  # the first product sets up the library
    _wait_for(device)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(n_at_once):
            torch.mm(a, a, out=out)
        _wait_for(device)
        done += n_at_once
    return done * 2 * n**3 / (time.perf_counter() - began)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def expected_seconds(flops: float, n_cells: int, device: torch.device, precision: str, n: int = 1) -> float:
    """Estimate the time for ``flops`` and ``n_cells`` on ``n`` devices, at half the rate of plain matrix products."""
    return (2 * flops / matrix_rate(device, precision) + _OVERHEAD * n_cells) / n


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
