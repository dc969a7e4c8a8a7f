"""Options that commands share, and how their text is read. Names and meanings are those of the verbs."""

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
    "BatchSize", "CellsAtOnce", "Config", "DataPaths", "Device", "Epochs", "Family", "GroupKey", "Layer",
    "LearningRate", "ModelPath", "NGpus", "NProcs", "Precision", "RandomState", "Resume", "RunDir", "WrittenData",
    "one_or_all", "read_config", "read_model", "read_resume", "read_validation", "read_weights",
]  # fmt: skip

DataPaths = Annotated[
    list[str], typer.Argument(metavar="DATA...", help="An .h5ad or .zarr, several of them, or a folder of such.")
]
WrittenData = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="An .h5ad or .zarr, several of them, or a folder of such. Written out, cells whose name several files "
        "have get the number of their file (AAAC-0, AAAC-1); other names stay. Genes that a file lacks are zero.",
    ),
]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="A model or run directory.")]
NGpus = Annotated[
    int | None, typer.Option(help="GPUs, one process each. [default: all there are, else one CPU process]")
]
NProcs = Annotated[int | None, typer.Option(help="Processes on the CPU, with --device cpu.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
RunDir = Annotated[
    Path | None,
    typer.Option(help="Where the run is written and continued. [default: a new directory under scllm_runs]"),
]
Epochs = Annotated[int | None, typer.Option(help="Passes over the cells. [default: the family's own]")]
BatchSize = Annotated[
    int | None, typer.Option(help="Cells of one optimiser step, over all processes. [default: the family's own]")
]
CellsAtOnce = Annotated[
    int | None,
    typer.Option("--batch-size", help="Cells of one forward pass; for speed and memory. [default: chosen]"),
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Highest learning rate. [default: the family's own]")]
GroupKey = Annotated[str | None, typer.Option(help="Column of obs with groups (donors) that are held out whole.")]
Layer = Annotated[str | None, typer.Option(help="Layer to read. [default: X]")]
Precision = Annotated[str, typer.Option(help="fp32, bf16, fp16, or auto: fp32 on a CPU, bf16 on a GPU that has it.")]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--no-resume",
        help="Insist that --run-dir holds a run to continue, or that it holds none. [default: continue one]",
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="TOML file with the other training settings, the fields of scllm.tl.TrainConfig.")
]
RandomState = Annotated[int, typer.Option(help="What weights, order, masks and dropout are a function of.")]
Family = Annotated[
    str | None,
    typer.Option(
        help="Family of a published checkpoint (scgpt, geneformer, ...), or module of a family from another package."
    ),
]


def read_config(path: Path | None) -> TrainConfig | None:
    """Training settings from a TOML file."""
    from scllm.engine.config import TrainConfig

    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"--config {path} is not there, a TOML file expected. Check the path.")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--config {path} is not TOML: {error}. Write one `name = value` a line.") from error
    return TrainConfig.from_dict(settings)


def read_model(path: str, family: str | None) -> CellModel:
    """A model that scllm wrote, or with its family a published checkpoint."""
    from scllm import models

    return models.load(path, family=family)


def read_resume(given: bool | None) -> Any:
    """``"auto"`` where neither ``--resume`` nor ``--no-resume`` is given."""
    return "auto" if given is None else given


def read_validation(text: str) -> float | str:
    """A share of cells, or the name of a column."""
    try:
        return float(text)
    except ValueError:
        return text


def read_weights(option: str, given: list[str]) -> str | Mapping[str, float]:
    """One bare name, or ``name=weight`` for each of several."""
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
            raise ValueError(f"{option} is {text!r}, name=weight expected where there are several. Write {option} a=1.")
    return weights


def one_or_all(texts: list[str]) -> str | list[str]:
    """The only text, or all of them."""
    return texts[0] if len(texts) == 1 else texts
