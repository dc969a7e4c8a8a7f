"""``scllm pretrain``, ``scllm finetune`` and ``scllm run``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from scllm._log import is_first_rank
from scllm.cli._app import Debug, Verbose
from scllm.cli._options import (
    BatchSize,
    Config,
    DataPaths,
    Device,
    Epochs,
    Family,
    GeneKey,
    GroupKey,
    Layer,
    LearningRate,
    MinCoverage,
    ModelPath,
    NGpus,
    NProcs,
    Precision,
    RandomState,
    Resume,
    RunDir,
    one_or_all,
    read_config,
    read_model,
    read_resume,
    read_validation,
    read_weights,
)

__all__ = ["finetune", "pretrain", "run"]


def pretrain(
    data: DataPaths,
    model: Annotated[
        str, typer.Option(help="Family of a new model, or a model or run directory to start from.")
    ] = "scgpt",
    family: Family = None,
    size: Annotated[str, typer.Option(help="Size of a new model: tiny, small or base.")] = "base",
    n_gpus: NGpus = None,
    n_procs: NProcs = None,
    device: Device = "auto",
    run_dir: RunDir = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    mask_ratio: Annotated[
        list[float] | None,
        typer.Option(
            help="Fraction of a cell's genes to mask; repeat it to draw one per step. [default: that of the family]"
        ),
    ] = None,
    left_out: Annotated[
        float | None,
        typer.Option(help="Fraction of genes to hold out of the input and predict. [default: that of the family]"),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout of the blocks. [default: that of the family]")] = None,
    validation: Annotated[
        str, typer.Option(help="Fraction of validation cells, or a column of obs with train and validation.")
    ] = "0.03",
    group_key: GroupKey = None,
    layer: Layer = None,
    gene_key: GeneKey = None,
    min_coverage: MinCoverage = None,
    precision: Precision = "auto",
    resume: Resume = None,
    config: Config = None,
    random_state: RandomState = 0,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be trained and what it costs, and write nothing."),
    ] = False,
    write_only: Annotated[
        bool,
        typer.Option("--write-only", help="Write the run directory, print the lines that start it, and do not train."),
    ] = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Pretrain a model on cells without labels. After a crash, the same command resumes the run."""
    from scllm import tl
    from scllm.cli._estimate import how_to_start, what_would_run
    from scllm.tl._pretrain import prepare, set_medians
    from scllm.tl._train import write

    if dry_run and write_only:
        raise typer.BadParameter("Expected --dry-run or --write-only, got both. Leave one out.")
    begun = model if family is None else read_model(model, family)
    options = {
        "size": size,
        "n_gpus": n_gpus,
        "n_procs": n_procs,
        "device": device,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "mask_ratio": mask_ratio or None,
        "left_out": left_out,
        "dropout": dropout,
        "validation": read_validation(validation),
        "group_key": group_key,
        "layer": layer,
        "gene_key": gene_key,
        "min_coverage": min_coverage,
        "precision": precision,
        "config": read_config(config),
        "random_state": random_state,
    }
    if dry_run:
        typer.echo(what_would_run(prepare(one_or_all(data), begun, **options), run_dir))
        return
    if write_only:
        training = prepare(one_or_all(data), begun, **options)
        set_medians(training)
        typer.echo(how_to_start(write(training, run_dir=run_dir, resume=read_resume(resume)), training))
        return
    typer.echo(tl.pretrain(one_or_all(data), begun, run_dir=run_dir, resume=read_resume(resume), **options))


def finetune(
    data: DataPaths,
    model: ModelPath,
    key: Annotated[list[str], typer.Option(help="Column of obs to predict; repeat it for several heads.")],
    family: Family = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(help="What to freeze: the first n blocks, encoder, or patterns of weight names (repeat it)."),
    ] = None,
    loss: Annotated[
        list[str] | None, typer.Option(help="ce, bce, dice or focal; for a weighted sum, repeat --loss name=weight.")
    ] = None,
    upsample: Annotated[bool, typer.Option("--upsample", help="Draw cells of rare labels more often.")] = False,
    class_weight: Annotated[
        list[str] | None,
        typer.Option(help="balanced, or repeat --class-weight label=weight. [default: all cells equal]"),
    ] = None,
    lora: Annotated[
        int | None, typer.Option(help="Rank of LoRA adapters to train instead of the blocks' weights.")
    ] = None,
    validation: Annotated[
        str, typer.Option(help="Fraction of validation cells, or a column of obs with train and validation.")
    ] = "0.1",
    group_key: GroupKey = None,
    layer: Layer = None,
    gene_key: GeneKey = None,
    min_coverage: MinCoverage = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    n_gpus: NGpus = None,
    n_procs: NProcs = None,
    device: Device = "auto",
    run_dir: RunDir = None,
    precision: Precision = "auto",
    resume: Resume = None,
    config: Config = None,
    random_state: RandomState = 0,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model to predict a column of obs."""
    from scllm import tl

    trained = tl.finetune(
        one_or_all(data),
        read_model(model, family),
        key=one_or_all(key),
        freeze=_freeze(freeze or ["0"]),
        loss=read_weights("--loss", loss or ["ce"]),
        upsample=upsample,  # type: ignore[arg-type]
        class_weight=read_weights("--class-weight", class_weight) if class_weight else None,  # type: ignore[arg-type]
        lora=lora,
        validation=read_validation(validation),
        group_key=group_key,
        layer=layer,
        gene_key=gene_key,
        min_coverage=min_coverage,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        n_gpus=n_gpus,
        n_procs=n_procs,
        device=device,
        run_dir=run_dir,
        precision=precision,
        resume=read_resume(resume),  # type: ignore[arg-type]
        config=read_config(config),
        random_state=random_state,
    )
    typer.echo(trained)


def run(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Directory that pretrain or finetune wrote.")],
    device: Device = "auto",
    family: Family = None,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Resume a run and finish it, alone or as one of the processes that torchrun starts."""
    from scllm.engine.run import Run
    from scllm.engine.worker import continue_run

    chosen = Run(run_dir.absolute())
    _ = chosen.spec  # raises if this is not a run directory, before anything is written
    if "RANK" in os.environ:
        continue_run(chosen, device=device, family=family)
    else:
        with chosen.locked():
            continue_run(chosen, device=device, family=family)
    if is_first_rank():
        shutil.rmtree(chosen.data, ignore_errors=True)  # the run is finished, so the copy is not needed
        typer.echo(f"The run in {run_dir} is finished. Its model is in {chosen.model}.")


def _freeze(texts: list[str]) -> int | str | tuple[str, ...]:
    """Parse a number of blocks, ``encoder``, or patterns."""
    if len(texts) > 1:
        return tuple(texts)
    return int(texts[0]) if texts[0].lstrip("-").isdigit() else texts[0]
