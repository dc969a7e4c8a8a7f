"""The steps that all training verbs share: settings, run directory, start of training and recording of the result."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scllm import settings
from scllm._log import log
from scllm._results import MatchSettings, record, thinned_history
from scllm._typing import IntArray
from scllm.data.arrays import write_arrays
from scllm.data.cells import CellSource
from scllm.data.checks import warn_of_empty_cells
from scllm.data.encode import encoder_to_dict
from scllm.data.fingerprint import fingerprint, hash_match, source_stamp
from scllm.data.genecorpus import RankedCells
from scllm.data.genes import GeneMatch
from scllm.data.matching import match_source
from scllm.data.shards import check_world
from scllm.data.soma import is_address
from scllm.data.source import RAW, has_layer, open_source
from scllm.engine.config import Settings, TrainConfig
from scllm.engine.device import check_gpus, check_number, resolve_device
from scllm.engine.initial import initialise
from scllm.engine.launch import cluster_command, launch
from scllm.engine.lora import LoraSettings, adapted_layers
from scllm.engine.objectives import Objective, objective_to_dict
from scllm.engine.optim import Freeze, frozen_weights
from scllm.engine.run import Run
from scllm.engine.spec import Cells, DataSpec, RunSpec
from scllm.engine.tracking import check_tracker
from scllm.engine.worker import training_encoder
from scllm.models.base import CellModel
from scllm.models.storage import is_native
from scllm.tl._cost import log_trained, log_training
from scllm.tl._ledger import record_training
from scllm.tl._model import remember

__all__ = [
    "Data",
    "Processes",
    "Training",
    "check_config",
    "check_resume",
    "check_trainable",
    "merged_config",
    "open_run",
    "processes",
    "train",
    "warn_of_unread_cells",
    "write",
]

Data = AnnData | str | PathLike[str] | CellSource | Sequence[str | PathLike[str]]


@dataclass(frozen=True)
class Processes:
    """The number of training processes and the device they use."""

    n: int
    device: str


def processes(n_gpus: int | None, n_procs: int | None, device: str) -> Processes:
    """Choose the processes: those asked for, or one for each GPU, or one on the CPU; raise if there are fewer GPUs."""
    if n_gpus is not None and n_procs is not None:
        raise TypeError(f"Expected n_gpus= or n_procs=, got both: {n_gpus} and {n_procs}. Leave one out.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        raise RuntimeError(
            f"Expected one process to call this function, got {world} (WORLD_SIZE={world}), such as torchrun starts. "
            "Call it without torchrun and pass n_gpus=, or let `scllm pretrain --write-only` write the run directory "
            "and run `torchrun ... -m scllm run RUN_DIR`."
        )
    n_gpus = None if n_gpus is None else check_number("n_gpus", n_gpus)
    n_procs = None if n_procs is None else check_number("n_procs", n_procs)
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
) -> Settings:
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
        "relational": False,
        "relational_weight": 20.0,
        "use_dropout": True,
        "schedule": "step",
        "warmup": 0,
        "precision": "auto",
        "random_state": 0,
    }
    return config.resolved({**general, **defaults})


@dataclass(frozen=True)
class Training:
    """A training that a verb has prepared and checked, before anything is written.

    Parameters
    ----------
    verb
        The function that trains.
    data, source
        The data as they were passed, and as they are read.
    matching
        How gene names are matched to the vocabulary.
    model
        Initial model.
    objective, settings
        Training objective and settings.
    cells
        Training and validation cells.
    where
        Processes and device.
    params
        Other arguments of the function, for the record.
    freeze, lora
        Weights that are not trained, and adapters.
    """

    verb: str
    data: Data
    source: CellSource
    matching: MatchSettings
    model: CellModel
    objective: Objective
    settings: Settings
    cells: Cells
    where: Processes
    params: Mapping[str, Any]
    freeze: Freeze = 0
    lora: LoraSettings | None = None

    @cached_property
    def match(self) -> GeneMatch:
        """The token of each gene of the data."""
        return match_source(self.source, self.model.vocab, **self.matching)

    @property
    def family(self) -> str | None:
        """Module of the model family, if it is in another package."""
        return self.model.family if "." in self.model.family else None

    @property
    def starts_here(self) -> bool:
        """Whether this process computes the initial weights; on several GPUs, the first training process does.

        This process would otherwise hold memory of a GPU for as long as the training lasts.
        """
        return self.where.n == 1 or self.where.device == "cpu"

    def spec(self) -> RunSpec:
        """Return the specification of the run; if it changes, that is another run."""
        model = self.model
        data = DataSpec(
            fingerprint=fingerprint(self.source),
            layer=self.source.layer,
            cells=self.cells.hash(),
            tokens=hash_match(self.match),
            **self.matching,
        )
        return RunSpec(
            verb=self.verb,
            family=model.family,
            model=asdict(model.config),
            weights=model.hash(),
            encoder=encoder_to_dict(model.encoder),
            heads=tuple(asdict(head) for head in model.head_specs),
            objective=objective_to_dict(self.objective),
            train=self.settings,
            freeze=self.freeze,
            lora=self.lora,
            params={name: str(value) for name, value in self.params.items()},
            data=data,
            data_reference=_reference(self.data, self.source.layer),
            data_stamp=source_stamp(self.source),
            processes=asdict(self.where),
            versions={"scllm": version("scllm-tools"), "torch": torch.__version__},
        )


def train(training: Training, *, run_dir: str | PathLike[str] | None, resume: bool | str) -> CellModel:
    """Create or resume the run directory, train, and record the result on the AnnData."""
    run = write(training, run_dir=run_dir, resume=resume)
    began, was_done = time.perf_counter(), run.is_done
    if was_done:
        log.info("loading the model of the finished run in %s", run.path)
    where = training.where
    trained = launch(run, n_procs=where.n, device=where.device, source=training.source, family=training.family)
    if not was_done:
        log_trained(trained, time.perf_counter() - began)
    shutil.rmtree(run.data, ignore_errors=True)  # The run is finished, so nothing reads the copy again.
    if isinstance(training.data, AnnData):
        settings_used = {
            **objective_to_dict(training.objective),
            "freeze": training.freeze,
            "lora": training.lora,
            **training.params,
            **training.settings.to_dict(),
        }
        record(training.data, training.verb, {**settings_used, "run_dir": run.path}, thinned_history(trained.history))
        remember(training.data, trained)
    return trained


def write(training: Training, *, run_dir: str | PathLike[str] | None, resume: bool | str) -> Run:
    """Write the run directory, or check that the one there is of the same training, and return it."""
    check_resume(resume, run_dir)
    _check_settings(training)
    spec = training.spec()
    made = _missing(Path(settings.run_dir) if run_dir is None else Path(run_dir))
    run = open_run(spec, run_dir=run_dir, resume=resume)
    if run_dir is None:
        made.append(run.path)
    if not run.is_done:
        with run.locked():
            log_training(run.path, training)
            if run.is_new():
                with _cleared_on_error(run, made):
                    _set_up(run, spec, training)
            elif not run.is_done:
                _set_up_again(run, spec, training)
    return run


def open_run(spec: RunSpec, *, run_dir: str | PathLike[str] | None, resume: bool | str) -> Run:
    """Return a new run directory, or one that holds a run of the same specification; raise on any other."""
    run = Run(_writable(Path(run_dir)) if run_dir is not None else _new_directory(spec.verb))
    if run.is_new():
        if resume is True:
            raise ValueError(
                f"Expected a run to resume in {run.path} (resume=True), but there is none. Pass resume='auto' to start "
                "one."
            )
        _check_free(run.path)
        return run
    if resume is False:
        raise ValueError(
            f"Expected an empty run directory (resume=False), but {run.path} already holds a run. Pass another "
            "run_dir, or resume='auto' to resume the run."
        )
    run.check(spec)
    return run


def check_resume(resume: object, run_dir: object) -> None:
    """Raise if ``resume`` is invalid, or if there is no directory to resume from."""
    if resume not in ("auto", True, False):
        raise ValueError(
            f"Expected resume to be 'auto', True or False, got {resume!r}. Pass 'auto' to resume a run if there is one."
        )
    if resume is True and run_dir is None:
        raise ValueError("Expected run_dir= with resume=True, got None. Pass the run directory to resume.")


def _check_settings(training: Training) -> None:
    """Raise on settings that exclude each other or do not fit the data or the model."""
    model, chosen, freeze = training.model, training.settings, training.freeze
    check_tracker(chosen.logger)
    if training.source.chunked:
        check_world(training.where.n, chosen.n_shards)
    if chosen.relational and training.verb != "pretrain":
        raise TypeError(
            "Expected relational=True only in tl.pretrain, whose loss has the relational term. Leave it out."
        )
    if chosen.relational and isinstance(training.source, RankedCells):
        raise ValueError(
            f"Expected expression values with relational=True, but {training.source.path} holds only the order of "
            "genes. Pass the counts, or relational=False."
        )
    if chosen.strategy == "fsdp" and chosen.precision == "fp16":
        raise ValueError(
            "Expected precision='bf16' or 'fp32' with strategy='fsdp', got 'fp16'. fp16 needs loss scaling, which does "
            "not support sharded weights. Leave precision= out."
        )
    if training.lora is not None:
        if freeze == "encoder":
            raise TypeError(
                "Expected lora= or freeze='encoder', got both. lora= adapts the encoder, but freeze='encoder' keeps it "
                "unchanged. Leave one out."
            )
        adapted_layers(model, frozen_weights(model, freeze))
    check_trainable(model, freeze)
    training_encoder(model, chosen.max_len)  # raises if the token sequences would be too short


def check_trainable(model: CellModel, freeze: Freeze) -> None:
    """Raise if int8 weights would have to be trained."""
    if model.weight_dtype != "float32" and freeze != "encoder":
        raise ValueError(
            f"Expected a model with float weights, got {model.weight_dtype} weights, which cannot be trained. Train "
            "only the heads with tl.finetune(freeze='encoder'), or train the model that you passed to tl.quantize."
        )


def _set_up(run: Run, spec: RunSpec, training: Training) -> None:
    """Write everything that another process needs to train the model to the run directory."""
    model, source, cells, chosen = training.model, training.source, training.cells, training.settings
    warn_of_unread_cells(source, training.match, cells.train)
    if training.starts_here:
        run.unstarted.unlink(missing_ok=True)  # left by a set-up that was killed
        where = training.where.device
        reference = initialise(model, source, training.match, cells, training.objective, chosen, device=where)
        if reference is not None:
            reference.save(run.reference)
    else:
        run.unstarted.touch()
    model.trained_on = record_training(model.trained_on, spec.verb, training.data, source, cells.train)
    model.save(run.model)
    _store(run, spec, source)
    run.create(spec, cells)
    if training.where.n > 1:
        command = cluster_command(run.path, training.where.n, training.family)
        log.info("to train on several machines, run on each of them: %s", command)


def _set_up_again(run: Run, spec: RunSpec, training: Training) -> None:
    """Update settings that may change, and where the run finds its data, which may have moved since it was created."""
    run.check(spec)
    if spec.data_reference != run.spec.data_reference:
        _store(run, spec, training.source)
    run.resume_with(spec)


def _store(run: Run, spec: RunSpec, source: CellSource) -> None:
    """Copy data to the run directory for the time of training if other processes could not find them."""
    if spec.data_reference is None:
        shutil.rmtree(run.data, ignore_errors=True)
        write_arrays(source, run.data, gene_key=spec.data.gene_key)


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
    return entry.name in ("cells.npz", "reference.npz", "unstarted") or entry.name.startswith(".")


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
