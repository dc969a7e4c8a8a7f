"""A forward pass over all cells in order, without gradients."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scllm._log import log, progress
from scllm._typing import IntArray
from scllm._words import time_in_words
from scllm.data.cells import CellSource
from scllm.data.checks import warn_of_empty_cells
from scllm.data.genes import GeneMatch
from scllm.engine.config import Precision
from scllm.engine.device import autocast, check_gpus, resolve_device, resolve_precision
from scllm.engine.estimate import (
    cells_in_words,
    device_in_words,
    expected_seconds,
    flops_per_cell,
    mean_tokens,
)
from scllm.engine.loader import Loader
from scllm.engine.memory import is_out_of_memory
from scllm.models.base import Batch, CellModel

__all__ = ["Forward", "predict"]

Forward = Callable[[CellModel, Batch], Tensor]

# default number of cells per forward pass: enough to keep the device busy, few enough to fit into memory
_CELLS = {"cpu": 64, "cuda": 512}
# tokens are limited too, because token sequences of all genes are long
_TOKENS = {"cpu": 1 << 17, "cuda": 1 << 20}


def predict(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    forward: Forward,
    *,
    rows: IntArray | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    n_gpus: int = 1,
    random_state: int = 0,
    desc: str = "embedding",
    passes: int | None = 1,
    obs: Mapping[str, NDArray[Any]] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Compute ``forward`` for consecutive batches of cells; results are on the CPU and in float32.

    Parameters
    ----------
    model
        The model, which is not changed: a copy is used for another device or precision.
    source, match
        The cells, and the token of each of their genes.
    forward
        What to compute for each batch; rows of its result are cells or tokens.
    rows
        Rows of the source; ``None``: all of them.
    batch_size
        Number of cells per forward pass; does not change the result.
    device, precision
        Where and how to compute.
    n_gpus
        Number of GPUs that share the batches.
    random_state
        Seed of ``batch.keys``, which ``forward`` may use to draw random numbers.
    desc
        What is done to the cells, for the log and the progress bar.
    passes
        Number of forward passes in ``forward``, to estimate the time; ``None``: one per token.
    obs
        Columns to add to the batches, with values for all rows of the source.

    Yields
    ------
    The slice of ``rows``, and the result of ``forward`` for them.
    """
    if n_gpus != 1:
        check_gpus(n_gpus)
    first = resolve_device(device)
    devices = [torch.device(first.type, i) for i in range(n_gpus)] if n_gpus > 1 else [first]
    longest = min(model.encoder.max_len, len(model.vocab) + model.encoder.n_specials)
    fitting = max(1, min(_CELLS[first.type], _TOKENS[first.type] // longest))
    size = fitting if batch_size is None else batch_size
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
        raise ValueError(
            f"Expected batch_size to be a whole number of at least 1, got {size!r}. Leave it out to use the default."
        )
    chosen = resolve_precision(precision, first)
    rows = np.arange(source.n_obs) if rows is None else rows
    if log.isEnabledFor(logging.INFO):
        n_tokens = mean_tokens(model, source, match, rows)
        flops = len(rows) * flops_per_cell(model, n_tokens, training=False) * (passes or n_tokens)
        seconds = expected_seconds(flops, len(rows), first, chosen, len(devices))
        log.info(
            "%s %s, %d at a time in %s on %s: %s",
            desc,
            cells_in_words(len(rows), source, match, n_tokens),
            size,
            chosen,
            device_in_words(first, len(devices)),
            time_in_words(seconds),
        )
    replicas = [_ready(model, where, chosen) for where in devices]
    cells = Loader(
        source,
        rows,
        match,
        model.encoder,
        model.vocab,
        size * len(devices),
        seed=random_state,
        obs=obs or {},
        training=False,
        pinned=first.type == "cuda",
    )

    is_special = model.is_special.cpu()

    def run(part: int, batch: Batch) -> Tensor:
        return _computed(forward, replicas[part], batch, chosen)

    row = n_empty = 0
    with (
        ThreadPoolExecutor(len(devices)) as threads,
        closing(cells.epoch(0, parts=len(devices))) as read,
        closing(progress(read, desc=desc, total=cells.n_batches(), unit="batch")) as steps,
    ):
        for parts in steps:
            done = [run(0, parts[0])] if len(parts) == 1 else list(threads.map(run, range(len(parts)), parts))
            n_cells = sum(batch.n_cells for batch in parts)
            n_empty += sum(_n_empty(batch, is_special) for batch in parts)
            yield slice(row, row + n_cells), torch.cat(done)
            row += n_cells
    warn_of_empty_cells(n_empty, len(rows))


def _computed(forward: Forward, replica: CellModel, batch: Batch, precision: str) -> Tensor:
    """Compute the result for a batch, or for both halves of it if memory runs out."""
    try:
        with torch.inference_mode(), autocast(precision, replica.device):
            return forward(replica, batch.to(replica.device)).float().cpu()
    except (RuntimeError, MemoryError) as error:
        if batch.n_cells <= 1 or not is_out_of_memory(error):
            raise
        log.info("memory ran out with %d cells at a time; halving them (%s)", batch.n_cells, str(error)[:80])
    # after the except clause, because the traceback holds what is in memory
    half = batch.n_cells // 2
    halves = batch.cells(0, half), batch.cells(half, batch.n_cells)
    return torch.cat([_computed(forward, replica, part, precision) for part in halves])


def _n_empty(batch: Batch, is_special: Tensor) -> int:
    """Count cells without an expressed gene; token sequences of some families contain zeros too."""
    gene = ~is_special[batch.genes]
    if batch.values is not None:
        gene &= batch.values > 0
    return batch.n_cells - len(batch.cell[gene].unique_consecutive())


def _ready(model: CellModel, device: torch.device, precision: str) -> CellModel:
    """Return the model in evaluation mode on a device.

    In bf16, weights of linear layers are cast once instead of in every pass. The residual stream, norms, softmax and
    pooling stay in fp32: cells differ little compared with what they share, and rounding would remove much of that.
    """
    if model.device == device and precision != "bf16" and not model.training:
        return model
    replica = copy.deepcopy(model).to(device).eval()
    if precision == "bf16":
        for module in replica.modules():
            if type(module) is nn.Linear:
                module.to(torch.bfloat16)
    return replica
