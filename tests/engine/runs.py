"""Runs in this process, and runs in other processes that tests can kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

import scllm
from scllm.data.run_files import read_history
from scllm.data.source import open_source
from scllm.tl import TrainConfig

# a user's script, for given data and settings
SCRIPT = """
import json, signal, sys
import scllm
# tests that run in the background of a shell ignore interrupts, and processes that they start inherit this
signal.signal(signal.SIGINT, signal.default_int_handler)
data, settings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
config = scllm.tl.TrainConfig(**{"relational": False} | settings.pop("config"))
data = scllm.datasets.toy(**data) if isinstance(data, dict) else data
print("start", flush=True)
scllm.tl.pretrain(data, config=config, **settings)
"""
TOY = {"n_cells": 120, "n_genes": 40}
SETTINGS = {"size": "tiny", "device": "cpu", "epochs": 3, "batch_size": 16, "validation": 0.1}


def pretrain(data, run_dir: Path, *, config: dict | None = None, **settings) -> scllm.models.CellModel:
    """Pretrain a tiny model on a CPU, with the objective of the family alone unless ``config`` says otherwise."""
    config = {"relational": False} | (config or {})
    return scllm.tl.pretrain(data, run_dir=run_dir, config=TrainConfig(**config), **SETTINGS | settings)


def start(
    run_dir: Path,
    *,
    data=TOY,
    config: dict | None = None,
    before: str = "",
    environment: dict | None = None,
    **settings,
) -> subprocess.Popen:
    """Do the same in another process, after running the code ``before``."""
    settings = SETTINGS | settings | {"run_dir": str(run_dir), "config": config or {}}
    data = str(data) if isinstance(data, Path) else data
    return subprocess.Popen(
        [sys.executable, "-c", before + SCRIPT, json.dumps(data), json.dumps(settings)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )  # fmt: skip


def interrupted(data, run_dir: Path, when, **settings) -> None:
    """Start a run that is interrupted while it reads, from a step on or as soon as a condition holds."""
    is_so = when if callable(when) else lambda: _last_step(run_dir / "history.jsonl") >= when
    source = open_source(data)
    read = source.read

    def read_or_stop(rows):
        if is_so():
            raise KeyboardInterrupt
        return read(rows)

    source.read = read_or_stop
    with pytest.raises(KeyboardInterrupt):
        pretrain(source, run_dir, **settings)
    source.close()
    assert not (run_dir / "done").exists()


def curve(run_dir: Path) -> pd.DataFrame:
    """Return the history without the columns that depend on time."""
    speed = ["cells_per_s", "tokens_per_s", "mfu", "data_wait", "peak_memory"]
    return read_history(run_dir / "history.jsonl").drop(columns=speed, errors="ignore")


def assert_same_curve(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    """Check that two histories are equal to 1e-5, line by line."""
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, atol=0)


def wait_for_step(run_dir: Path, step: int, *, seconds: float = 120) -> None:
    """Wait until a step is in the history."""
    wait_until(lambda: _last_step(run_dir / "history.jsonl") >= step, seconds)


def wait_until(is_so, seconds: float) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.002)


def workers(run_dir: Path) -> list[int]:
    """Return the processes that train in a run directory."""
    return [pid for pid, line in _command_lines(run_dir) if "scllm.engine.agent" not in line]


def agents(run_dir: Path) -> list[int]:
    """Return the torchrun processes that supervise them."""
    return [pid for pid, line in _command_lines(run_dir) if "scllm.engine.agent" in line]


def _command_lines(run_dir: Path) -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        # a zombie has no command line
        if folder.name.isdigit() and "scllm" in words and str(run_dir) in words:
            found.append((int(folder.name), " ".join(words)))
    return found


def _last_step(history: Path) -> int:
    lines = history.read_text().splitlines() if history.exists() else []
    whole = [line for line in lines[-2:] if line.endswith("}")]
    return json.loads(whole[-1])["step"] if whole else 0
