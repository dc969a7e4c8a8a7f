"""What a pretraining would be and cost, for ``--dry-run``. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np

from scllm import models
from scllm._typing import IntArray
from scllm.data import genes
from scllm.data.genes import GeneMatch
from scllm.data.source import CellSource, open_source
from scllm.engine.config import Precision, TrainConfig
from scllm.engine.device import resolve_device, resolve_precision
from scllm.engine.estimate import say_cost
from scllm.engine.launch import cluster_command
from scllm.models.base import CellModel
from scllm.tl._inputs import check_layer, take_medians
from scllm.tl._model import gene_match, resolve
from scllm.tl._train import divide, merged_config, processes

__all__ = ["what_would_run"]

_SAMPLE = 2048


def what_would_run(
    data: str | Sequence[str],
    model: str,
    *,
    size: str,
    n_gpus: int | None,
    n_procs: int | None,
    device: str,
    run_dir: str | PathLike[str] | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    mask_ratio: Sequence[float] | None,
    left_out: float | None,
    dropout: float | None,
    validation: float | str,
    group_key: str | None,
    layer: str | None,
    precision: Precision,
    config: TrainConfig | None,
    random_state: int,
) -> str:
    """The model, the cells, floating-point operations and time, and the line for a cluster."""
    source = open_source(data, layer=layer)
    where = processes(n_gpus, n_procs, device)
    begun = _fresh(source, model, size)
    take_medians(source, begun)
    check_layer(source, begun, layer, None)
    match = gene_match(data, source, begun)
    settings = merged_config(
        config, {"epochs": epochs, "batch_size": batch_size, "lr": lr}, models.family_module(begun.family).PRETRAIN,
        precision=precision, random_state=random_state,
    )  # fmt: skip
    training, held_out = divide(source, validation, group_key=group_key, random_state=settings.random_state or 0)
    assert settings.batch_size is not None
    per_epoch = -(-len(training) // settings.batch_size)
    n_steps = settings.steps or per_epoch * (settings.epochs or 1)
    chosen = resolve_device(where.device)
    used = resolve_precision(settings.precision or "auto", chosen)
    n_tokens = _mean_length(source, match, begun, training)
    n_seen = min(n_steps * settings.batch_size, -(-n_steps // per_epoch) * len(training))
    cost = say_cost(begun, n_tokens, n_seen, chosen, used, where.n)
    lines = [
        repr(begun),
        f"  cells       {len(training):,} for training, {len(held_out):,} for validation",
        f"  steps       {n_steps:,} of {settings.batch_size} cells ({n_steps / per_epoch:.1f} epochs)",
        f"  processes   {where.n} on {where.device}, {used}",
        f"  cost        {cost}",
        "On several machines, once this command has written the run directory, on each of them:",
        f"  {cluster_command(run_dir or 'RUN_DIR', where.n)}",
    ]
    return "\n".join(lines)


def _fresh(source: CellSource, model: str, size: str) -> CellModel:
    if model not in models.families():
        return resolve(model, None)
    return models.build(model, vocab=list(dict.fromkeys(genes.strip_version(source.genes))), size=size)


def _mean_length(source: CellSource, match: GeneMatch, model: CellModel, rows: IntArray) -> float:
    """Mean tokens a cell, of cells spread over the data."""
    sample = np.unique(rows[np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows))).astype(np.int64)])
    lengths = match.tokens(source.read(sample)).lengths + model.encoder.n_specials
    return float(np.minimum(lengths, model.encoder.max_len).mean())
