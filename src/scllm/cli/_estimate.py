"""Describe a pretraining run and its cost for ``--dry-run``, and how to start it for ``--write-only``."""

from __future__ import annotations

from os import PathLike

from scllm._words import time_in_words
from scllm.engine.launch import cluster_command, run_command
from scllm.engine.run import Run
from scllm.tl._cost import training_cost
from scllm.tl._train import Training, warn_of_unread_cells

__all__ = ["how_to_start", "what_would_run"]


def what_would_run(begun: Training, run_dir: str | PathLike[str] | None) -> str:
    """Describe the model, cells, floating-point operations and time, and give the command for a cluster."""
    model, config, where, cells = begun.model, begun.settings, begun.where, begun.cells
    warn_of_unread_cells(begun.source, begun.match, cells.train)
    cost = training_cost(begun)
    n_epochs = cost.n_steps / config.steps_per_epoch(len(cells.train))
    each = f"{cost.flops_per_cell / 1e9:.3g} GFLOP per cell of {cost.n_tokens:,.0f} tokens"
    lines = [
        repr(model),
        f"  cells       {len(cells.train):,} for training, {len(cells.validation):,} for validation",
        f"  steps       {cost.n_steps:,} of {config.batch_size} cells ({n_epochs:.1f} epochs)",
        f"  processes   {where.n} on {where.device}, {cost.precision}",
        f"  cost        {each}, {time_in_words(cost.seconds)}",
        "To use several machines, let this command write the run directory, then run on each of them:",
        f"  {cluster_command(run_dir or 'RUN_DIR', where.n, begun.family)}",
    ]
    return "\n".join(lines)


def how_to_start(run: Run, training: Training) -> str:
    """Return the lines that train a run directory: on this machine, or on each of several machines."""
    if run.is_done:
        return f"The run in {run.path} is finished. Its model is in {run.model}."
    path, where = run.path.absolute(), training.where
    lines = [
        f"wrote {path}; to train it on one machine, run",
        f"  {run_command(path, where.n, training.family)}",
        "or on each of several machines that see this directory and the data under the same paths",
        f"  {cluster_command(path, where.n, training.family)}",
    ]
    return "\n".join(lines)
