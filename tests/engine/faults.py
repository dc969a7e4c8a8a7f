"""Faults that happen to a run of two processes, each provoked for real, and what is left of the run afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from engine.runs import TOY, agents, curve, pretrain, start, wait_for_step, wait_until, workers

import scllm
from scllm.engine.checkpoint import Checkpoints
from scllm.engine.run import Run

# 84 steps of a model whose processes can be told to fail; one checkpoint every 3 steps
SETTINGS = {"model": "engine.faulty", "epochs": 12, "dropout": 0.0}
CONFIG = {"save_every": 3}
STEP = 18
# a data set in several files, one of which vanishes
PARTS = ("a.zarr", "b.zarr")


@dataclass(frozen=True)
class Fault:
    """One fault.

    ``fault`` is what :mod:`engine.faulty` does by itself; ``act`` is done to the run from outside once it has reached a
    step. ``cause`` are words of the message, ``exit_codes`` those of the process that the user has started.
    """

    act: Callable[[Path, subprocess.Popen], None] = lambda run_dir, process: None
    fault: str = "none:0:0"
    cause: tuple[str, ...] = ()
    exit_codes: tuple[int, ...] = (1,)
    config: dict = field(default_factory=dict)
    before: str = ""
    from_files: bool = False
    goes_on: bool = False


def _kill(rank: int) -> Callable[[Path, subprocess.Popen], None]:
    return lambda run_dir, process: os.kill(of_rank(run_dir, rank), signal.SIGKILL)


def of_rank(run_dir: Path, rank: int) -> int:
    """Return the process of a rank."""
    for pid in workers(run_dir):
        environment = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return pid
    raise LookupError(f"no process of rank {rank}")


def _vanish(run_dir: Path, process: subprocess.Popen) -> None:
    """Rename the folder of a file's values, so that reads fail from now on."""
    values = run_dir.parent / PARTS[1] / "X" / "data"
    values.rename(values.with_name("elsewhere"))


FAULTS = {
    "kill -9 of rank 0": Fault(_kill(0), cause=("exit status", "SIGKILL")),
    "kill -9 of rank 1": Fault(_kill(1), cause=("exit status", "SIGKILL")),
    "kill -9 of the parent": Fault(lambda run_dir, process: process.kill(), exit_codes=(-signal.SIGKILL,)),
    "SIGTERM to the parent": Fault(lambda run_dir, process: process.terminate(), exit_codes=(-signal.SIGTERM,)),
    "SIGUSR1 to rank 1": Fault(
        lambda run_dir, process: os.kill(of_rank(run_dir, 1), signal.SIGUSR1), exit_codes=(0,), goes_on=True
    ),
    "one rank raises alone": Fault(fault=f"raise:{STEP}:1", cause=("ArithmeticError", "this rank fails alone")),
    "disk full": Fault(
        before="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))\n",
        cause=("OSError", "step-", "could not be written"),
    ),
    "a rank hangs": Fault(
        fault=f"hang:{STEP}:1", config={"timeout": "10s"}, cause=("exit status", "Timed out"),
    ),
    "files vanish": Fault(_vanish, from_files=True, cause=(PARTS[1],)),
    "NaN on one rank": Fault(fault=f"nan:{STEP}:1", exit_codes=(0,), goes_on=True),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a fault has done."""

    exit_code: int
    output: str
    step: int  # last step in the history
    saved: int  # step of the newest checkpoint, from which the run resumes; 0 if there is none
    orphans: list[int]
    resumed: pd.DataFrame  # the curve after the run was resumed by one process
    seconds: float  # until all processes had ended

    @property
    def n_lost(self) -> int:
        """Number of steps that have to be done again."""
        return self.step - self.saved


def write_parts(folder: Path) -> list[Path]:
    """Write the toy data in two files."""
    toy = scllm.datasets.toy(**TOY)
    for name, rows in zip(PARTS, np.array_split(np.arange(toy.n_obs), 2), strict=True):
        toy[rows].write_zarr(folder / name)
    return [folder / name for name in PARTS]


def suffer(name: str, folder: Path) -> Outcome:
    """Let a run of two processes suffer a fault, and resume it with one process."""
    fault, run_dir = FAULTS[name], folder / "run"
    data = [str(path) for path in write_parts(folder)] if fault.from_files else TOY
    config = CONFIG | fault.config
    environment = {"FAULT": f"{fault.fault}:{folder}", "PYTHONPATH": search_path()}
    process = start(
        run_dir, data=data, n_procs=2, config=config, before=fault.before, environment=environment, **SETTINGS
    )
    if fault.fault.startswith("none") and not fault.before:
        wait_for_step(run_dir, STEP)
        fault.act(run_dir, process)
    began = time.monotonic()
    output, _ = process.communicate(timeout=180)
    wait_until(lambda: fault.goes_on or not workers(run_dir) + agents(run_dir), seconds=45)
    seconds = time.monotonic() - began
    if fault.from_files:
        values = folder / PARTS[1] / "X"
        (values / "elsewhere").rename(values / "data")
    output += (run_dir / "log.txt").read_text() if (run_dir / "log.txt").exists() else ""
    found = curve(run_dir) if (run_dir / "history.jsonl").exists() else None
    step = 0 if found is None else int(found["step"].max())
    newest = Checkpoints(Run(run_dir).checkpoints, Run(run_dir).last).newest_first()
    saved = int(newest[0].name.removeprefix("step-").removesuffix(".pt")) if newest else 0
    orphans = workers(run_dir) + agents(run_dir)
    pretrain(data if fault.from_files else scllm.datasets.toy(**TOY), run_dir, config=config, **SETTINGS)
    return Outcome(process.returncode, output, step, saved, orphans, curve(run_dir), seconds)


def ranks_with_different_directories(folder: Path) -> str:
    """Start two ranks on directories that differ by one step, and return what they say."""
    scllm.datasets.toy(**TOY).write_h5ad(folder / "toy.h5ad")
    for name in ("one", "two"):
        pretrain(folder / "toy.h5ad", folder / name, config=CONFIG, **SETTINGS | {"epochs": 1})
        (folder / name / "done").unlink()
    # the second one resumes from an earlier step
    (folder / "two" / "checkpoints" / "step-7.pt").unlink()
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    group |= {"PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "scllm", "run", str(folder / name), "--device", "cpu", "--family", "engine.faulty"],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank, name in enumerate(("one", "two"))
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 1 for process in processes), outputs
    return "\n".join(outputs)


def search_path() -> str:
    """Where other processes find scllm and the faulty family."""
    here = [str(Path(scllm.__file__).parents[1]), str(Path(__file__).parents[1])]
    return os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
