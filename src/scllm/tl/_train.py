"""The steps that all training verbs share: settings, run directory, start of training and recording of the result."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray

from scllm import settings
from scllm._log import details, log
from scllm._results import MatchSettings, record
from scllm._typing import IntArray
from scllm.data.arrays import write_arrays
from scllm.data.cells import CellSource
from scllm.data.checks import warn_of_empty_cells
from scllm.data.encode import encoder_to_dict
from scllm.data.fingerprint import fingerprint, source_stamp
from scllm.data.genes import GeneMatch
from scllm.data.matching import match_source
from scllm.data.soma import is_address
from scllm.data.source import RAW, has_layer, open_source
from scllm.engine.config import TrainConfig
from scllm.engine.device import check_gpus, resolve_device
from scllm.engine.gene_init import start_from_data
from scllm.engine.head_start import start_heads
from scllm.engine.launch import cluster_command, cropping, launch
from scllm.engine.lora import LoraSettings, adapted_layers
from scllm.engine.objectives import Label, Objective, objective_to_dict
from scllm.engine.optim import Freeze, frozen_weights
from scllm.engine.run import Run
from scllm.engine.tracking import check_tracker
from scllm.models.base import CellModel
from scllm.models.storage import is_native
from scllm.tl._cost import log_trained, log_training
from scllm.tl._ledger import record_training
from scllm.tl._model import remember

__all__ = [
    "Data",
    "Processes",
    "check_config",
    "check_resume",
    "check_trainable",
    "hash_cells",
    "hash_match",
    "merged_config",
    "processes",
    "train",
    "warn_of_unread_cells",
]

Data = AnnData | str | PathLike[str] | CellSource | Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class Processes:
    """The number of training processes and the device they use."""

    n: int
    device: str


def processes(n_gpus: int | None, n_procs: int | None, device: str) -> Processes:
    """Choose all available GPUs, or else one CPU process; raise if fewer GPUs are available than requested."""
    if n_gpus is not None and n_procs is not None:
        raise TypeError(f"Expected n_gpus= or n_procs=, got both: {n_gpus} and {n_procs}. Leave one out.")
    for name, n in (("n_gpus", n_gpus), ("n_procs", n_procs)):
        if n is not None and n < 1:
            raise ValueError(f"Expected {name} of at least 1, got {n}. Leave it out to have it chosen.")
    if n_gpus is not None:
        if device == "cpu":
            raise TypeError(
                f"n_gpus={n_gpus} cannot be used with device='cpu'. Pass n_procs= for several CPU processes."
            )
        check_gpus(n_gpus)
        return Processes(n_gpus, "cuda")
    kind = resolve_device(device).type
    if kind == "cuda" and device in ("auto", "cuda"):
        n = torch.cuda.device_count() if n_procs is None else n_procs
        check_gpus(n)
        return Processes(n, "cuda")
    return Processes(n_procs or 1, device if kind == "cuda" else "cpu")


def check_config(config: object) -> None:
    """Raise unless ``config`` is a :class:`TrainConfig` or ``None``."""
    if config is not None and not isinstance(config, TrainConfig):
        raise TypeError(f"Expected config to be a TrainConfig, got {config!r:.60}. Pass scllm.tl.TrainConfig(...).")


def merged_config(
    config: TrainConfig | None,
    given: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    precision: str,
    random_state: int,
) -> TrainConfig:
    """Complete the settings: arguments first, then ``config``, then the defaults of the family."""
    check_config(config)
    config = config or TrainConfig()
    # A default that was passed explicitly looks like one that was left out, so only other values count as passed.
    given = {**given, "precision": None if precision == "auto" else precision, "random_state": random_state or None}
    config = config.merged(given)
    if config.steps is not None and config.epochs is not None:
        raise TypeError(
            f"Expected steps or epochs, got both: steps={config.steps} and epochs={config.epochs}. Leave one out."
        )
    if config.steps is not None:
        defaults = {name: value for name, value in defaults.items() if name != "epochs"}
    general = {
        "downsample": 0.0,
        "use_dropout": True,
        "schedule": "step",
        "warmup": 0,
        "precision": "auto",
        "random_state": 0,
    }
    return config.resolved({**general, **defaults})


def train(
    verb: str,
    data: Data,
    source: CellSource,
    model: CellModel,
    objective: Objective,
    config: TrainConfig,
    *,
    layer: str | None,
    matching: MatchSettings,
    cells: Mapping[str, NDArray[Any]],
    where: Processes,
    run_dir: str | PathLike[str] | None,
    resume: bool | str,
    freeze: Freeze = 0,
    lora: LoraSettings | None = None,
    params: Mapping[str, Any],
) -> CellModel:
    """Create or resume the run directory, train, and record the result on the AnnData."""
    check_resume(resume, run_dir)
    _check_settings(model, config, freeze, lora)
    match = match_source(source, model.vocab, **matching)
    spec = {
        "verb": verb,
        "family": model.family,
        "model": asdict(model.config),
        "weights": model.hash(),
        "encoder": encoder_to_dict(model.encoder),
        "heads": [asdict(head) for head in model.head_specs],
        "objective": objective_to_dict(objective),
        "train": config.to_dict(),
        "freeze": freeze,
        "lora": None if lora is None else asdict(lora),
        "params": {name: str(value) for name, value in params.items()},
        "data": _identity(source, layer, matching, cells, match),
        "data_reference": _reference(data, layer),
        "data_stamp": source_stamp(source),
        "processes": asdict(where),
        "versions": {"scllm": version("scllm-tools"), "torch": torch.__version__},
    }
    made = _missing(Path(settings.run_dir) if run_dir is None else Path(run_dir))
    run = Run(_writable(Path(run_dir)) if run_dir is not None else _new_directory(verb))
    if run_dir is None:
        made.append(run.path)
    family = model.family if "." in model.family else None
    if run.is_new():
        if resume is True:
            raise ValueError(
                f"Expected a run to resume in {run.path} (resume=True), but there is none. Pass resume='auto' to start "
                "one."
            )
        _check_free(run.path)
    else:
        if resume is False:
            raise ValueError(
                f"Expected an empty run directory (resume=False), but {run.path} already holds a run. Pass another "
                "run_dir, or resume='auto' to resume the run."
            )
        run.check(spec)
    if not run.is_done:
        with run.locked():
            log_training(run.path, source, match, model, config, cells, where.device, where.n)
            if run.is_new():
                with _cleared_on_error(run, made):
                    _set_up(run, spec, data, source, model, match, objective, config, cells, where)
            elif not run.is_done:
                _set_up_again(run, spec, source)
    else:
        log.info("loading the model of the finished run in %s", run.path)
    began, was_done = time.perf_counter(), run.is_done
    trained = launch(run, n_procs=where.n, device=where.device, source=source, family=family)
    if not was_done:
        log_trained(trained, time.perf_counter() - began)
    shutil.rmtree(run.data, ignore_errors=True)  # The run is finished, so nothing reads the copy again.
    if isinstance(data, AnnData):
        settings_used = {**objective_to_dict(objective), "freeze": freeze, "lora": lora, **params, **config.to_dict()}
        record(data, verb, {**settings_used, "run_dir": run.path}, trained.history)
        remember(data, trained)
    return trained


def _identity(
    source: CellSource,
    layer: str | None,
    matching: MatchSettings,
    cells: Mapping[str, NDArray[Any]],
    match: GeneMatch,
) -> dict[str, Any]:
    """Describe the data of a run; if any of this changes, it is a different run."""
    return {
        "fingerprint": fingerprint(source),
        "layer": layer,
        "cells": hash_cells(cells),
        "tokens": hash_match(match),
        **matching,
    }


def check_resume(resume: object, run_dir: object) -> None:
    """Raise if ``resume`` is invalid, or if there is no directory to resume from."""
    if resume not in ("auto", True, False):
        raise ValueError(
            f"Expected resume to be 'auto', True or False, got {resume!r}. Pass 'auto' to resume a run if there is one."
        )
    if resume is True and run_dir is None:
        raise ValueError("Expected run_dir= with resume=True, got None. Pass the run directory to resume.")


def _check_settings(model: CellModel, config: TrainConfig, freeze: Freeze, lora: LoraSettings | None) -> None:
    """Raise on settings that exclude each other or do not fit the model."""
    check_tracker(config.logger)
    if config.strategy == "fsdp" and config.precision == "fp16":
        raise ValueError(
            "Expected precision='bf16' or 'fp32' with strategy='fsdp', got 'fp16'. fp16 needs loss scaling, which does "
            "not support sharded weights. Leave precision= out."
        )
    if lora is not None:
        if freeze == "encoder":
            raise TypeError(
                "Expected lora= or freeze='encoder', got both. lora= adapts the encoder, but freeze='encoder' keeps it "
                "unchanged. Leave one out."
            )
        adapted_layers(model, frozen_weights(model, freeze))
    check_trainable(model, freeze)
    cropping(model, config.max_len)  # raises if the token sequences would be too short


def check_trainable(model: CellModel, freeze: Freeze) -> None:
    """Raise if int8 weights would have to be trained."""
    if model.weight_dtype != "float32" and freeze != "encoder":
        raise ValueError(
            f"Expected a model with float weights, got {model.weight_dtype} weights, which cannot be trained. Train "
            "only the heads with tl.finetune(freeze='encoder'), or train the model that you passed to tl.quantize."
        )


def _set_up(
    run: Run,
    spec: Mapping[str, Any],
    data: Data,
    source: CellSource,
    model: CellModel,
    match: GeneMatch,
    objective: Objective,
    config: TrainConfig,
    cells: Mapping[str, NDArray[Any]],
    where: Processes,
) -> None:
    """Write everything that another process needs to train the model to the run directory."""
    warn_of_unread_cells(source, match, cells["train"])
    seed = config.random_state or 0
    if config.gene_init == "svd":
        start_from_data(model, source, match, cells["train"], random_state=seed)
    if isinstance(objective, Label) and model.heads_read_cells:
        targets = {name.removeprefix("obs:"): column for name, column in cells.items() if name.startswith("obs:")}
        with details():
            start_heads(
                model,
                source,
                match,
                cells["train"],
                objective,
                targets,
                weights=cells.get("weights"),
                device=where.device,
                random_state=seed,
            )
    model.trained_on = record_training(model.trained_on, spec["verb"], data, source, cells["train"])
    model.save(run.model)
    _store(run, spec, source)
    run.create(spec, cells)
    if where.n > 1:
        log.info("to train on several machines, run on each of them: %s", cluster_command(run.path, where.n))


def _set_up_again(run: Run, spec: Mapping[str, Any], source: CellSource) -> None:
    """Update settings that may change, and where the run finds its data, which may have moved since it was created."""
    run.check(spec)
    if spec["data_reference"] != run.spec["data_reference"]:
        _store(run, spec, source)
    run.resume_with(spec)


def _store(run: Run, spec: Mapping[str, Any], source: CellSource) -> None:
    """Copy data to the run directory for the time of training if other processes could not find them."""
    if spec["data_reference"] is None:
        shutil.rmtree(run.data, ignore_errors=True)
        write_arrays(source, run.data, gene_key=spec["data"]["gene_key"])


def hash_cells(cells: Mapping[str, NDArray[Any]]) -> str:
    """Hash the split, labels and weights of the cells, because a run on other labels is a different run."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(cells):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(cells[name]).tobytes())
    return digest.hexdigest()


def hash_match(match: GeneMatch) -> str:
    """Hash the token of each gene for each file, because a gene that a file did not measure is not a zero."""
    files = {f"file {number}": file.token_ids for number, file in enumerate(match.files)}
    of_cell = {} if match.file_of is None else {"file of": match.file_of}
    return hash_cells({"tokens": match.token_ids, **files, **of_cell})


def _reference(data: Data, layer: str | None) -> str | list[str] | None:
    """Return where another process finds the data, or ``None`` for data in memory."""
    if isinstance(data, AnnData):
        # X and .raw of a backed AnnData are those of its file, but tables and layers may have been changed in memory.
        if not data.isbacked or data.is_view or (layer is not None and (layer != RAW or has_layer(data, RAW))):
            return None
        path = str(Path(data.filename).absolute())
        stored, held = (open_source(one, layer=layer) for one in (path, data))
        return path if stored.var.equals(held.var) else None
    if isinstance(data, (str, PathLike)):
        return _absolute(data)
    if isinstance(data, (list, tuple)) and all(isinstance(part, (str, PathLike)) for part in data):
        return [_absolute(part) for part in data]
    return None


def _absolute(data: str | PathLike[str]) -> str:
    """Return a path that means the same in another folder; an address is returned as it is."""
    return fspath(data) if is_address(data) else str(Path(data).absolute())


def _writable(path: Path) -> Path:
    """Return ``path`` if a run directory can be created there; raise otherwise."""
    there = path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "not a directory" if not there.is_dir() else "not writable"
        raise ValueError(
            f"Expected run_dir to be a writable directory, got '{path}', but '{there}' is {what}. Pass another run_dir."
        )
    return path


def _new_directory(verb: str) -> Path:
    """Create a new directory for every call."""
    stem = f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 0
    while True:
        path = Path(settings.run_dir) / (f"{stem}-{number}" if number else stem)
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1


def _missing(path: Path) -> list[Path]:
    """List the directory and its parents that do not exist yet, outermost first."""
    return [folder for folder in (*reversed(path.absolute().parents), path.absolute()) if not folder.exists()]


@contextmanager
def _cleared_on_error(run: Run, made: Sequence[Path]) -> Iterator[None]:
    """Remove the files and new directories of a run whose set-up fails."""
    try:
        yield
    except BaseException:
        run.clear()
        for folder in reversed(made):
            if any(folder.iterdir()):
                break
            folder.rmdir()
        raise


def _check_free(path: Path) -> None:
    """Raise if a directory for a new run holds files of other programs."""
    others = [entry.name for entry in path.iterdir() if not _is_left_over(entry)] if path.exists() else []
    if others:
        raise ValueError(
            f"Expected run_dir to be an empty directory or a run, but {path} holds other files (first: {others[0]!r}). "
            "Pass another run_dir."
        )


def _is_left_over(entry: Path) -> bool:
    """Return whether this is left from an interrupted set-up; it is overwritten, so no other file may pass."""
    match entry.name:
        case "model":
            return is_native(entry)
        case "data":
            return entry.is_dir() and all(file.suffix == ".npy" or file.stem == "cells" for file in entry.iterdir())
    return entry.name == "cells.npz" or entry.name.startswith(".")


def warn_of_unread_cells(source: CellSource, match: GeneMatch, rows: IntArray) -> None:
    """Warn of cells that express no gene in the vocabulary, if all cells are in memory."""
    if source.chunked:
        return
    n_empty = 0
    for start in range(0, len(rows), 8192):
        chosen = np.sort(rows)[start : start + 8192]
        lengths = match.tokens(source.read(chosen), chosen).lengths
        n_empty += int((lengths == 0).sum())
    warn_of_empty_cells(n_empty, len(rows))
