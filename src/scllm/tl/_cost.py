"""Estimate and log what a training reads and how long it takes, before it starts."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scllm._log import log
from scllm._words import time_in_words
from scllm.engine.device import resolve_device, resolve_precision
from scllm.engine.estimate import (
    cells_in_words,
    device_in_words,
    expected_seconds,
    flops_per_cell,
    mean_tokens,
)
from scllm.engine.worker import training_encoder
from scllm.models.base import CellModel

__all__ = ["Cost", "log_trained", "log_training", "training_cost"]

if TYPE_CHECKING:
    from scllm.tl._train import Training


@dataclass(frozen=True)
class Cost:
    """Tokens read of each cell, and the computation and time that a training needs."""

    device: torch.device
    precision: str
    n_steps: int
    n_tokens: float
    flops_per_cell: float
    seconds: float


def training_cost(training: Training) -> Cost:
    """Estimate the cost of training, including validation on whole cells after each epoch."""
    model, source, match, config = training.model, training.source, training.match, training.settings
    training_cells, validation_cells = training.cells.train, training.cells.validation
    where = resolve_device(training.where.device)
    precision = resolve_precision(config.precision, where)
    n_steps = config.n_steps(len(training_cells))
    n_epochs = -(-n_steps // config.steps_per_epoch(len(training_cells)))
    n_trained = min(n_steps * config.batch_size, n_epochs * len(training_cells))
    n_validated = n_epochs * len(validation_cells)
    reader = copy.copy(model)
    reader.encoder = training_encoder(model, config.max_len)
    n_tokens = mean_tokens(reader, source, match, training_cells)
    # the view of a cell for the relational term has about as many tokens
    trained = flops_per_cell(reader, n_tokens) * (2 if config.relational else 1)
    validated = flops_per_cell(model, mean_tokens(model, source, match, validation_cells), training=False)
    flops = n_trained * trained + n_validated * validated
    seconds = expected_seconds(flops, n_trained + n_validated, where, precision, training.where.n)
    return Cost(where, precision, n_steps, n_tokens, trained, seconds)


def log_training(path: Path, training: Training) -> None:
    """Log the model, data, settings and estimated duration of a training."""
    if not log.isEnabledFor(logging.INFO):
        return
    model, config, n = training.model, training.settings, training.where.n
    cost, n_cells = training_cost(training), len(training.cells.train)
    number, unit = (config.epochs, "epoch") if config.steps is None else (config.steps, "step")
    length = f"{number} {unit}{'s' if number != 1 else ''}"
    log.info(
        "training %s (%.1f M weights) on %s, %s of %d cells a step in %s on %s: %.3g GFLOP a cell, %s",
        model.family,
        model.n_parameters / 1e6,
        cells_in_words(n_cells, training.source, training.match, cost.n_tokens),
        length,
        config.batch_size,
        cost.precision,
        device_in_words(cost.device, n),
        cost.flops_per_cell / 1e9,
        time_in_words(cost.seconds),
    )
    if n > 1 and cost.device.type == "cuda" and config.batch_size < 64 * n:
        log.info(
            "training with %d cells a step, which is few for %d GPUs; batch_size=%d would keep them busy",
            config.batch_size,
            n,
            64 * n,
        )
    log.info("writing the run to %s", path)


def log_trained(model: CellModel, seconds: float) -> None:
    """Log how long the training took and the best validation loss, and whether the mean of each gene is better."""
    assert model.history is not None
    said = f"trained {model.history['step'].max()} steps in {seconds:.0f} s"
    validated = model.history[model.history["split"] == "validation"].dropna(subset="loss")
    if not validated.empty:
        best = validated.loc[validated["loss"].idxmin()]
        said += f": best validation loss {best['loss']:.4g}, at step {int(best['step'])}"
        baseline = best.get("mean_prediction", float("inf"))
        if best["loss"] > baseline:
            said += (
                f"; predicting each gene by its mean or frequency gives {baseline:.4g}, which is better: train for "
                "more epochs, or with a higher lr"
            )
    log.info(said)
