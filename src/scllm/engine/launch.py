"""Start a run in this process or in several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from scllm import models
from scllm._log import log, show_progress, warn
from scllm.data.cells import CellSource
from scllm.data.encode import Encoder
from scllm.data.fingerprint import fingerprint, same_matrix, source_stamp
from scllm.data.matching import match_source
from scllm.data.source import open_source
from scllm.engine import ranks
from scllm.engine.calibrate import calibrate
from scllm.engine.checkpoint import restore, save, writing
from scllm.engine.collapse import CollapseWatch
from scllm.engine.config import TrainConfig
from scllm.engine.device import resolve_device, resolve_precision
from scllm.engine.loader import Loader
from scllm.engine.loop import fit
from scllm.engine.lora import LoraSettings, add_adapters, merge_adapters
from scllm.engine.objectives import Label, Objective, objective_from_dict
from scllm.engine.optim import freeze, without_dropout
from scllm.engine.run import Run
from scllm.engine.sharding import shard
from scllm.engine.tracking import tracker
from scllm.models.base import CellModel

__all__ = ["cluster_command", "command", "continue_run", "cropping", "launch"]

# environment variable of processes whose parent holds the lock of the run directory
_LOCKED = "SCLLM_RUN_LOCKED"
# what torchrun prints before its own traceback when a process has failed
_FAILED = "] failed (exitcode"


def launch(
    run: Run, *, n_procs: int, device: str, source: CellSource | None = None, family: str | None = None
) -> CellModel:
    """Train the model of a run directory to the end and return it.

    Parameters
    ----------
    run
        The run directory, with its specification, its cells and its initial model.
    n_procs
        Number of processes. With 1, training runs in this process on ``source``; with more, in new processes on the
        data that the directory names.
    device
        Device to train on.
    source
        The data, if this process has already opened them.
    family
        Module of a model family from another package.
    """
    if not run.is_done:
        with run.locked() as lock:
            if n_procs == 1:
                _train(run, device, source, family)
            elif not run.is_done:
                _train_in_processes(run, n_procs, device, family, lock)
    return models.load(run.path, family=family)


def continue_run(run: Run, *, device: str = "auto", family: str | None = None) -> None:
    """Resume the run of a directory and train it to the end; this is ``python -m scllm run``."""
    if not run.is_done:
        with _locked_by_first_rank(run):
            log.info("resuming the run in %s", run.path)
            _train(run, device, None, family)


def command(run: Run, n_procs: int, device: str, family: str | None = None) -> list[str]:
    """Return the command that starts a run in several processes on this machine."""
    config = TrainConfig.from_dict(run.spec["train"])
    return [
        sys.executable,
        "-m",
        "scllm.engine.agent",
        str(os.getpid()),
        "--standalone",
        f"--nproc-per-node={n_procs}",
        f"--max-restarts={config.max_restarts}",
        "-m",
        "scllm",
        "run",
        str(run.path),
        "--device",
        device,
        "--debug",
        *(["--family", family] if family else []),
    ]


def cluster_command(run_dir: object, n_procs: int) -> str:
    """Return the command to start on each of several machines to train a run directory together."""
    return (
        f"torchrun --nnodes=NODES --nproc-per-node={n_procs} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
        f"-m scllm run {run_dir}"
    )


@contextmanager
def _locked_by_first_rank(run: Run) -> Iterator[None]:
    """Lock the directory in the first rank if the user started torchrun; otherwise the parent process has locked it."""
    if os.environ.get("RANK") == "0" and _LOCKED not in os.environ:
        with run.locked():
            yield
    else:
        yield


def _train(run: Run, device: str, source: CellSource | None, family: str | None) -> None:
    chosen = resolve_device(device)
    with ranks.joined(chosen):
        if run.is_done:
            # another process, which held the lock until now, has finished it; all ranks check this at the same time
            return
        spec = run.spec
        config = TrainConfig.from_dict(spec["train"])
        if source is None:
            source = _open(run, spec)
        model = models.load(run.model, family=family)
        if config.use_dropout is False:
            without_dropout(model)  # before adapters are added, which have their own dropout
        _choose_trained(model, spec)
        model.to(chosen)
        objective = objective_from_dict(spec["objective"])
        training, validation = _loaders(run, spec, config, source, model, objective)
        precision = resolve_precision(config.precision or "auto", chosen)
        log.debug("training on %s in %s, %d cells a step", chosen, precision, config.batch_size)
        if config.compile or config.checkpointing:
            model.speed_up(compile=config.compile, checkpointing=config.checkpointing)
        if config.strategy == "fsdp" and ranks.world() > 1:
            shard(model)
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
                from_start=spec["verb"] == "finetune",
                precision=precision,
                track=seen,
            )
        if ranks.rank() == 0:
            watch.finish()
            _finish(run, family, chosen, validation if isinstance(objective, Label) else None, precision)
        ranks.wait_for_all()


def _choose_trained(model: CellModel, spec: dict[str, Any]) -> None:
    """Freeze weights and add adapters, if the specification says so."""
    if spec["freeze"]:
        freeze(model, spec["freeze"])
    if spec["lora"]:
        add_adapters(model, LoraSettings(**spec["lora"]), random_state=spec["train"]["random_state"] or 0)


def _open(run: Run, spec: dict[str, Any]) -> CellSource:
    reference = spec["data_reference"]
    if reference is None:
        if not run.data.exists():
            raise FileNotFoundError(
                f"'{run.path}' was trained on data in memory, which are not stored in it. Call the function again with "
                "the same data and the same run_dir."
            )
        return open_source(run.data)
    source = open_source(reference, layer=spec["data"]["layer"])
    if source_stamp(source) == spec["data_stamp"]:  # the files have not changed since they were hashed
        return source
    seen, expected = fingerprint(source), spec["data"]["fingerprint"]
    if not same_matrix(seen, expected):
        raise ValueError(
            f"{reference} has changed since the run in '{run.path}' began: expected fingerprint {expected}, got {seen}."
            " The data split and the labels are stored by row. Restore the data, or start another run."
        )
    return source


def _loaders(
    run: Run, spec: dict[str, Any], config: TrainConfig, source: CellSource, model: CellModel, objective: Objective
) -> tuple[Loader, Loader | None]:
    data, cells = spec["data"], run.cells
    match = match_source(source, model.vocab, gene_key=data["gene_key"], min_coverage=data["min_coverage"])
    obs = {name.removeprefix("obs:"): column for name, column in cells.items() if name.startswith("obs:")}
    common = {
        "source": source,
        "match": match,
        "encoder": model.encoder,
        "vocab": model.vocab,
        "obs": obs,
        "keep_empty": ranks.world() > 1,
        "pinned": model.device.type == "cuda",
        "keep_whole": getattr(objective, "predicts_whole_cells", False),
    }
    seed = config.random_state or 0
    assert config.batch_size is not None
    training = Loader(
        rows=cells["train"],
        batch_size=config.batch_size,
        seed=seed,
        weights=cells.get("weights"),
        downsample=config.downsample or 0.0,
        **common | {"encoder": cropping(model, config.max_len)},
    )
    if not len(cells["validation"]):
        return training, None
    return training, Loader(rows=cells["validation"], batch_size=config.batch_size, seed=seed, training=False, **common)


def cropping(model: CellModel, max_len: int | None) -> Encoder:
    """Return the model's encoder, with a shorter ``max_len`` for training if one is set."""
    encoder = model.encoder
    if max_len is None or max_len >= encoder.max_len:
        return encoder
    return replace(encoder, max_len=max_len)  # type: ignore[type-var]


def _finish(run: Run, family: str | None, device: torch.device, validation: Loader | None, precision: str) -> None:
    """Write the best weights to the model folder and mark the run as done."""
    best = restore(run.best)
    assert best is not None
    model = models.load(run.model, family=family)
    if any(".lora_" in name for name in best):
        _choose_trained(model, run.spec)
        model.load_state_dict(best)
        merge_adapters(model)
        save(run.best, model.state_dict())
    else:
        model.load_state_dict(best)
    if validation is not None:
        calibrate(model.to(device), replace(validation, keep_empty=False), precision)
        model.cpu()
    model.history = run.table()
    fresh = run.path / ".model"
    with writing(run.model):
        model.save(fresh)
        # file by file, so that a complete model folder exists whenever this process is killed
        for file in fresh.iterdir():
            file.replace(run.model / file.name)
        fresh.rmdir()
        run.finish()


def _train_in_processes(run: Run, n_procs: int, device: str, family: str | None, lock: int) -> None:
    environment = os.environ | {_LOCKED: "1"}
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        # processes share the cores equally, unless the caller has set these variables
        environment.setdefault(name, str(max(1, (os.cpu_count() or 1) // n_procs)))
    with run.log.open("w") as output:
        # In a new session, so that an interrupt in the terminal reaches the processes only through this one. They end
        # if this process ends (see `scllm.engine.agent`), and hold the lock until then.
        process = subprocess.Popen(
            command(run, n_procs, device, family),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=[lock],
        )
        try:
            _follow(run, process)
        except BaseException:
            _stop(process)
            raise
    if run.is_done:
        if process.returncode:
            # workers sometimes abort while exiting, after all results have been saved
            warn(
                f"The processes of the run in '{run.path}' ended with exit status {process.returncode} after the run "
                f"had finished and saved everything. The result is complete; the processes' output is in {run.log}."
            )
        return
    raise RuntimeError(
        f"The run in '{run.path}' ended with exit status {process.returncode} before it was done. Call again with the "
        f"same run_dir to resume from the last checkpoint. From {run.log}:\n{_last_words(run.log)}"
    )


def _follow(run: Run, process: subprocess.Popen[bytes]) -> None:
    """Show progress until the processes end, and warn on their behalf, because their own warnings go to the log."""
    watch = CollapseWatch(run.history)
    with tqdm(desc=f"training in {run.path.name}", unit="step", disable=not show_progress(), leave=False) as bar:
        while process.poll() is None:
            time.sleep(0.2)
            line = _last_line(run.history)
            watch.look(line)
            if line is not None:
                bar.n = line["step"]
                bar.set_postfix(loss=f"{line['loss']:.4g}")
    if run.is_done:
        watch.finish()


def _last_words(log: Path) -> str:
    """Return the last output of the processes and torchrun's root cause, without torchrun's own traceback."""
    lines = log.read_text(errors="replace").splitlines()
    stopped = max((i for i, line in enumerate(lines) if _FAILED in line), default=len(lines))
    cause = max((i for i, line in enumerate(lines) if line.startswith("Root Cause")), default=len(lines))
    return "\n".join(lines[max(0, stopped - 40) : stopped] + lines[cause:])


def _last_line(history: Path) -> dict[str, Any] | None:
    """Return the last complete line of a history, without reading all of it."""
    if not history.exists():
        return None
    with history.open("rb") as handle:
        handle.seek(max(0, history.stat().st_size - 8192))
        lines = handle.read().split(b"\n")
    return json.loads(lines[-2]) if len(lines) > 1 else None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
