"""What a pretraining would be and cost, for ``--dry-run``. Nothing is written."""

from __future__ import annotations

from os import PathLike

from scllm.engine.device import resolve_device, resolve_precision
from scllm.engine.estimate import say_cost
from scllm.engine.launch import cluster_command
from scllm.tl._model import gene_match
from scllm.tl._pretrain import Prepared
from scllm.tl._train import Data, mean_length

__all__ = ["what_would_run"]


def what_would_run(data: Data, begun: Prepared, run_dir: str | PathLike[str] | None) -> str:
    """The model, the cells, floating-point operations and time, and the line for a cluster."""
    model, config, where = begun.model, begun.config, begun.where
    training = begun.cells["train"]
    assert config.batch_size is not None
    per_epoch = -(-len(training) // config.batch_size)
    n_steps = config.steps or per_epoch * (config.epochs or 1)
    device = resolve_device(where.device)
    precision = resolve_precision(config.precision or "auto", device)
    n_tokens = mean_length(begun.source, gene_match(data, begun.source, model), model, training)
    n_seen = min(n_steps * config.batch_size, -(-n_steps // per_epoch) * len(training))
    lines = [
        repr(model),
        f"  cells       {len(training):,} for training, {len(begun.cells['validation']):,} for validation",
        f"  steps       {n_steps:,} of {config.batch_size} cells ({n_steps / per_epoch:.1f} epochs)",
        f"  processes   {where.n} on {where.device}, {precision}",
        f"  cost        {say_cost(model, n_tokens, n_seen, device, precision, where.n)}",
        "On several machines, once this command has written the run directory, on each of them:",
        f"  {cluster_command(run_dir or 'RUN_DIR', where.n)}",
    ]
    return "\n".join(lines)
