"""Start a run in this process or in several processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from scllm import models
from scllm._cpus import n_cpus
from scllm._log import log, show_progress, warn
from scllm.data.cells import CellSource
from scllm.engine.collapse import CollapseWatch
from scllm.engine.run import Run
from scllm.engine.worker import LOCKED, train_here
from scllm.models.base import CellModel

__all__ = ["cluster_command", "command", "launch", "run_command"]

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
                train_here(run, device, source, family)
            else:
                _train_with_fitting_batches(run, n_procs, device, family, lock)
    return models.load(run.path, family=family)


def command(run: Run, n_procs: int, device: str, family: str | None = None) -> list[str]:
    """Return the command that starts a run in several processes on this machine."""
    return [
        sys.executable,
        "-m",
        "scllm.engine.agent",
        str(os.getpid()),
        "--standalone",
        f"--nproc-per-node={n_procs}",
        f"--max-restarts={run.spec.train.max_restarts}",
        "-m",
        "scllm",
        "run",
        str(run.path),
        "--device",
        device,
        "--debug",
        *(["--family", family] if family else []),
    ]


def run_command(run_dir: object, n_procs: int, family: str | None = None) -> str:
    """Return the command that trains a run directory on one machine."""
    program = "python" if n_procs == 1 else f"torchrun --standalone --nproc-per-node={n_procs}"
    return f"{program} {_program(run_dir, family)}"


def cluster_command(run_dir: object, n_procs: int, family: str | None = None) -> str:
    """Return the command to start on each of several machines to train a run directory together."""
    return (
        f"torchrun --nnodes=NODES --nproc-per-node={n_procs} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
        f"{_program(run_dir, family)}"
    )


def _program(run_dir: object, family: str | None) -> str:
    return f"-m scllm run {shlex.quote(str(run_dir))}{'' if family is None else f' --family {family}'}"


def _train_with_fitting_batches(run: Run, n_procs: int, device: str, family: str | None, lock: int) -> None:
    """Train in processes, and start them again if one has run out of memory and noted a smaller micro-batch."""
    while not run.is_done:
        before = _noted(run.max_tokens)
        try:
            _train_in_processes(run, n_procs, device, family, lock)
        except RuntimeError:
            now = _noted(run.max_tokens)
            if now == before:
                raise
            log.warning("memory ran out; resuming with micro-batches of %s tokens at most and the same batch_size", now)


def _noted(file: Path) -> str | None:
    return file.read_text() if file.is_file() else None


def _train_in_processes(run: Run, n_procs: int, device: str, family: str | None, lock: int) -> None:
    environment = os.environ | {LOCKED: "1"}
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        # processes share the cores equally, unless the caller has set these variables
        environment.setdefault(name, str(max(1, n_cpus() // n_procs)))
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
