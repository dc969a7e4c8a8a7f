"""The program of a training process: open the run directory, train, and write the result."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from scllm import models
from scllm._log import log
from scllm.data.cells import CellSource
from scllm.data.encode import Encoder
from scllm.data.fingerprint import fingerprint, same_matrix, source_stamp
from scllm.data.genes import GeneMatch
from scllm.data.matching import match_source
from scllm.data.reference import Reference
from scllm.data.source import open_source
from scllm.engine import ranks
from scllm.engine.calibrate import calibrate
from scllm.engine.checkpoint import restore, save, writing
from scllm.engine.collapse import CollapseWatch
from scllm.engine.device import resolve_device, resolve_precision
from scllm.engine.initial import initialise
from scllm.engine.loader import Loader
from scllm.engine.loop import fit
from scllm.engine.lora import add_adapters, merge_adapters
from scllm.engine.objectives import Label, Objective, objective_from_dict
from scllm.engine.optim import freeze, without_dropout
from scllm.engine.run import Run
from scllm.engine.sharding import shard
from scllm.engine.spec import RunSpec
from scllm.engine.tracking import tracker
from scllm.models.base import CellModel

__all__ = ["LOCKED", "continue_run", "train_here", "training_encoder"]

# environment variable of processes whose parent holds the lock of the run directory
LOCKED = "SCLLM_RUN_LOCKED"
# validation cells where they are evaluated several times an epoch
_MAX_VALIDATION = 10_000


def continue_run(run: Run, *, device: str = "auto", family: str | None = None) -> None:
    """Resume the run of a directory and train it to the end; this is ``python -m scllm run``."""
    if not run.is_done:
        if run.spec.family == "spatial":
            raise ValueError(
                f"Expected a run of tl.pretrain or tl.finetune in {run.path}, got one of tl.{run.spec.verb}, whose "
                "image features are not in the directory. Resume it with the call that started it."
            )
        with _locked_by_first_rank(run):
            log.info("resuming the run in %s", run.path)
            train_here(run, device, None, family)


def train_here(run: Run, device: str, source: CellSource | None, family: str | None) -> None:
    """Train in this process, alone or as one of several, and write the result to the run directory.

    Parameters
    ----------
    run
        The run directory.
    device
        Device to train on.
    source
        The data, if this process has already opened them.
    family
        Module of a model family from another package.
    """
    chosen = resolve_device(device)
    with ranks.joined(chosen, run.spec.train.timeout_seconds()):
        if run.is_done:
            # another process, which held the lock until now, has finished it; all ranks check this at the same time
            return
        spec = run.spec
        if source is None:
            source = _open(run, spec)
        _start(run, spec, source, device, family)
        model = models.load(run.model, family=family)
        if not spec.train.use_dropout:
            without_dropout(model)  # before adapters are added, which have their own dropout
        _choose_trained(model, spec)
        model.to(chosen)
        objective = objective_from_dict(spec.objective, model.family)
        training, validation = _loaders(run, spec, source, model, objective)
        config, precision = spec.train, resolve_precision(spec.train.precision, chosen)
        log.debug("training on %s in %s, %d cells a step", chosen, precision, config.batch_size)
        if config.compile or config.checkpointing:
            model.speed_up(compile=config.compile, checkpointing=config.checkpointing)
        if config.strategy == "fsdp" and ranks.world() > 1:
            shard(model, precision)
        watch = CollapseWatch(run.history)
        with tracker(config.logger if ranks.rank() == 0 else None, run) as track:

            def seen(line: dict[str, Any]) -> None:
                track(line)
                watch.look(line)

            fit(
                model,
                training,
                objective,
                config,
                run=run,
                validation=validation,
                from_start=spec.verb in ("finetune", "fit_perturbation"),
                precision=precision,
                track=seen,
            )
        if ranks.rank() == 0:
            watch.finish()
        ranks.wait_for_first()  # until the best weights, which all ranks read, are written
        labelled = (training, validation) if isinstance(objective, Label) else None
        _finish(run, family, chosen, labelled, precision)
        ranks.wait_for_first()


@contextmanager
def _locked_by_first_rank(run: Run) -> Iterator[None]:
    """Lock the directory in the first rank if the user started torchrun; otherwise the parent process has locked it."""
    if os.environ.get("RANK") == "0" and LOCKED not in os.environ:
        with run.locked():
            yield
    else:
        yield


def _start(run: Run, spec: RunSpec, source: CellSource, device: str, family: str | None) -> None:
    """Compute the initial weights, if the process that wrote the directory has left that to this one."""
    if ranks.rank() == 0 and run.unstarted.exists():
        model = models.load(run.model, family=family)
        objective = objective_from_dict(spec.objective, model.family)
        match = _match(source, spec, model)
        reference = initialise(model, source, match, run.cells, objective, spec.train, device=device)
        with writing(run.model):
            if reference is not None:
                reference.save(run.reference)
            run.replace_model(model)
            run.unstarted.unlink()
    ranks.wait_for_first()


def _match(source: CellSource, spec: RunSpec, model: CellModel) -> GeneMatch:
    """Find the token of each gene."""
    return match_source(source, model.vocab, gene_key=spec.data.gene_key, min_coverage=spec.data.min_coverage)


def _choose_trained(model: CellModel, spec: RunSpec) -> None:
    """Freeze weights and add adapters, if the specification says so."""
    if spec.freeze:
        freeze(model, spec.freeze)
    if spec.lora:
        add_adapters(model, spec.lora, random_state=spec.train.random_state)


def _open(run: Run, spec: RunSpec) -> CellSource:
    reference = spec.data_reference
    if reference is None:
        if not run.data.exists():
            raise FileNotFoundError(
                f"'{run.path}' was trained on data in memory, which are not stored in it. Call the function again with "
                "the same data and the same run_dir."
            )
        return open_source(run.data)
    source = open_source(reference, layer=spec.data.layer)
    if source_stamp(source) == spec.data_stamp:  # the files have not changed since they were hashed
        return source
    seen, expected = fingerprint(source), spec.data.fingerprint
    if not same_matrix(seen, expected):
        raise ValueError(
            f"{reference} has changed since the run in '{run.path}' began: expected fingerprint {expected}, got {seen}."
            " The data split and the labels are stored by row. Restore the data, or start another run."
        )
    return source


def _loaders(
    run: Run, spec: RunSpec, source: CellSource, model: CellModel, objective: Objective
) -> tuple[Loader, Loader | None]:
    config, cells = spec.train, run.cells
    match = _match(source, spec, model)
    common: dict[str, Any] = {
        "source": source,
        "match": match,
        "encoder": model.encoder,
        "vocab": model.vocab,
        "batch_size": config.batch_size,
        "seed": config.random_state,
        "obs": {f"label:{key}": column for key, column in cells.targets.items()},
        "keep_empty": ranks.world() > 1,
        "pinned": model.device.type == "cuda",
        "keep_whole": getattr(objective, "predicts_whole_cells", False),
        "reference": Reference.load(run.reference) if config.relational else None,
        "inputs": cells.inputs,
    }
    held_out = cells.validation
    if config.eval_every is not None and len(held_out) > _MAX_VALIDATION:
        chosen = np.random.default_rng(config.random_state).choice(held_out, _MAX_VALIDATION, replace=False)
        held_out = np.sort(chosen)
    training = Loader(
        rows=cells.train,
        weights=cells.weights,
        n_shards=config.n_shards,
        shuffle_cells=config.shuffle_cells,
        downsample=config.downsample,
        **common | {"encoder": training_encoder(model, config.max_len)},
    )
    return training, Loader(rows=held_out, training=False, **common) if len(held_out) else None


def training_encoder(model: CellModel, max_len: int | None) -> Encoder:
    """Return the model's encoder, with a shorter ``max_len`` for training if one is set."""
    encoder = model.encoder
    if max_len is None or max_len >= encoder.max_len:
        return encoder
    return replace(encoder, max_len=max_len)  # type: ignore[type-var]


def _finish(
    run: Run,
    family: str | None,
    device: torch.device,
    labelled: tuple[Loader, Loader | None] | None,
    precision: str,
) -> None:
    """Write the best weights to the model folder and mark the run as done.

    Heads on labels are calibrated by all ranks, with the training and validation cells.
    """
    if ranks.rank() != 0 and labelled is None:
        return
    best = restore(run.best)
    assert best is not None
    model = models.load(run.model, family=family)
    is_adapted = any(".lora_" in name for name in best)
    if is_adapted:
        _choose_trained(model, run.spec)
    model.load_state_dict(best)
    if is_adapted:
        merge_adapters(model)
    if labelled is not None:
        calibrate(model.to(device), *labelled, precision)
        model.cpu()
    if ranks.rank() != 0:
        return
    if is_adapted:
        save(run.best, model.state_dict())
    model.history = run.table()
    with writing(run.model):
        run.replace_model(model)
        run.finish()
