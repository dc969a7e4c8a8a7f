"""Options that commands share, with the names and meanings that they have in Python, and how they are parsed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from scllm.engine.config import TrainConfig
    from scllm.models.base import CellModel

__all__ = [
    "BatchSize",
    "CellsAtOnce",
    "Config",
    "DataPaths",
    "Device",
    "Epochs",
    "Family",
    "GeneKey",
    "GroupKey",
    "Layer",
    "LearningRate",
    "MinCoverage",
    "ModelPath",
    "NGpus",
    "NProcs",
    "Precision",
    "RandomState",
    "Resume",
    "RunDir",
    "WrittenData",
    "one_or_all",
    "read_config",
    "read_model",
    "read_resume",
    "read_validation",
    "read_weights",
]

DataPaths = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="One or more .h5ad or .zarr files, TileDB-SOMA folders or addresses, or a folder of them.",
    ),
]
WrittenData = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="One or more .h5ad or .zarr files, or a folder of them; for --out .npy and .zarr also TileDB-SOMA. In an "
        "output with cell names, those that occur in several files get the number of their file (AAAC-0, AAAC-1). "
        "Genes that a file lacks are zero.",
    ),
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="A model or run directory.")]
NGpus = Annotated[int | None, typer.Option(help="Number of GPUs, one process each. [default: all, or one CPU process]")]
NProcs = Annotated[int | None, typer.Option(help="Number of CPU processes, with --device cpu.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
RunDir = Annotated[
    Path | None,
    typer.Option(help="Directory of the run, to start or resume it. [default: a new directory in scllm_runs]"),
]
Epochs = Annotated[int | None, typer.Option(help="Number of passes over the cells. [default: that of the family]")]
BatchSize = Annotated[
    int | None, typer.Option(help="Cells per optimiser step, over all processes. [default: that of the family]")
]
CellsAtOnce = Annotated[
    int | None,
    typer.Option("--batch-size", help="Cells per forward pass; affects only speed and memory. [default: automatic]"),
]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="Highest learning rate. [default: that of the family]")
]
GroupKey = Annotated[
    str | None, typer.Option(help="Column of obs with groups (such as donors) that are held out as a whole.")
]
Layer = Annotated[
    str | None, typer.Option(help="Layer to read; raw is .raw, unless there is a layer of that name. [default: X]")
]
GeneKey = Annotated[
    str | None, typer.Option(help="Column of var with gene names. [default: the one with the most matches]")
]
MinCoverage = Annotated[
    float | None, typer.Option(help="Minimum fraction of genes that must be in the model's vocabulary. [default: 0.3]")
]
Precision = Annotated[
    str, typer.Option(help="fp32, bf16, fp16, or auto: fp32 on a CPU, bf16 on a GPU that supports it.")
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Fail if --run-dir holds no run to resume, or if it holds one. [default: resume or start]",
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="TOML file with other training settings, the fields of scllm.tl.TrainConfig.")
]
RandomState = Annotated[int, typer.Option(help="Seed for weight initialisation, data order, masking and dropout.")]
Family = Annotated[
    str | None,
    typer.Option(
        help="Family of a published checkpoint (scgpt, geneformer, ...), or the module of a family in another package."
    ),
]


def read_config(path: Path | None) -> TrainConfig | None:
    """Read training settings from a TOML file."""
    from scllm.engine.config import TrainConfig

    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"Expected a TOML file as --config, but {path} does not exist. Check the path.")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"Expected a TOML file as --config, but {path} is not: {error}. Write `name = value` lines."
        ) from error
    return TrainConfig.from_dict(settings)


def read_model(path: str, family: str | None) -> CellModel:
    """Load a model that scllm wrote, or a published checkpoint if its family is given."""
    from scllm import models

    return models.load(path, family=family)


def read_resume(given: bool | None) -> Any:
    """Return ``"auto"`` if neither ``--resume`` nor ``--no-resume`` is given."""
    return "auto" if given is None else given


def read_validation(text: str) -> float | str:
    """Parse a fraction of cells, or the name of a column."""
    try:
        return float(text)
    except ValueError:
        return text


def read_weights(option: str, given: list[str]) -> str | Mapping[str, float]:
    """Parse one name, or ``name=weight`` for each of several."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    weights = {}
    for text in given:
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"Expected {option} name=weight if there are several, got {text!r}. Write {option} a=1.")
    return weights


def one_or_all(texts: list[str]) -> str | list[str]:
    """Return the only text, or all of them."""
    return texts[0] if len(texts) == 1 else texts
