"""``scllm info``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scllm.cli._app import Debug, Verbose
from scllm.cli._options import Family

if TYPE_CHECKING:
    from scllm.engine.run import Run
    from scllm.models.base import CellModel

__all__ = ["info"]

_SHOWN = 12


def info(
    path: Annotated[Path, typer.Argument(metavar="RUN_DIR_OR_MODEL", help="A run directory or a model folder.")],
    family: Family = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Show a model (architecture, vocabulary, encoder, heads) and the progress of its run."""
    from scllm import models
    from scllm.engine.run import Run

    run = Run(path)
    is_run = path.is_dir() and not run.is_new()
    # an unfinished run holds its initial model, which models.load would reject
    model = models.load(run.model if is_run else path, family=family)
    lines = [*_architecture(model), *(_progress(run) if is_run else [])]
    width = max(len(name) for name, _ in lines)
    typer.echo("\n".join(f"{name:<{width}}  {text}" for name, text in lines))


def _architecture(model: CellModel) -> list[tuple[str, str]]:
    settings = ", ".join(f"{name}={value!r}" for name, value in vars(model.config).items())
    lines = [
        ("family", model.family),
        ("architecture", settings),
        ("parameters", f"{model.n_parameters:,}"),
        ("vocabulary", repr(model.vocab)),
        ("encoder", repr(model.encoder)),
    ]
    for spec in model.head_specs:
        classes = [] if spec.classes is None else list(spec.classes)
        more = f", ... ({len(classes)} in all)" if len(classes) > _SHOWN else ""
        lines.append((f"head {spec.key}", "a value" if spec.classes is None else ", ".join(classes[:_SHOWN]) + more))
    return lines if model.head_specs else [*lines, ("heads", "none: not fine-tuned")]


def _progress(run: Run) -> list[tuple[str, str]]:
    spec, cells, history = run.spec, run.cells, run.table()
    n_cells = len(cells.train)
    per_epoch, n_steps = spec.train.steps_per_epoch(n_cells), spec.train.n_steps(n_cells)
    step = 0 if history is None else int(history["step"].max())
    lines = [
        ("run", f"{spec.verb}, {'finished' if run.is_done else 'not finished: resume it with `scllm run`'}"),
        ("cells", f"{n_cells:,} for training, {len(cells.validation):,} for validation"),
        ("steps", f"{step:,} of {n_steps:,}"),
        ("epochs", f"{step / per_epoch:.1f} of {n_steps / per_epoch:.1f}"),
    ]
    found = None if history is None else history[history["split"] == "validation"]
    if found is not None and len(found):
        best = found.loc[found["loss"].idxmin()]
        lines.append(("best validation loss", f"{best['loss']:.4g} at step {int(best['step']):,}"))
    return [*lines, ("versions", ", ".join(f"{name} {number}" for name, number in spec.versions.items()))]
