"""Checkpoints by time and by signal: a scheduler that ends a job loses nothing."""

from __future__ import annotations

import os
import signal

import pytest
from engine.runs import assert_same_curve, curve, pretrain, start, wait_for_step, wait_until, workers
from messages import naming

from scllm.engine.run import Run
from scllm.models.storage import read_torch
from scllm.tl import TrainConfig

# part of one epoch, at whose end alone a checkpoint is written
N_STEPS = 60
SLOW = {"epochs": None, "batch_size": 1, "config": {"steps": N_STEPS, "save_every": None}}


def last_step(run_dir) -> int:
    return read_torch(run_dir / "last.pt")["step"]


@pytest.mark.parametrize("n_procs", [1, 2])
def test_a_run_that_is_told_to_end_loses_no_step(toy, tmp_path, n_procs):
    run_dir = tmp_path / "run"
    process = start(run_dir, n_procs=n_procs, **SLOW)
    wait_for_step(run_dir, 5)
    for told in [process.pid] if n_procs == 1 else workers(run_dir):
        os.kill(told, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGTERM if n_procs == 1 else 1), output
    assert not Run(run_dir).is_done
    assert last_step(run_dir) == curve(run_dir)["step"].max()
    pretrain(toy.copy(), run_dir, n_procs=n_procs, **SLOW)
    if n_procs == 1:
        pretrain(toy, tmp_path / "whole", **SLOW)
        assert_same_curve(curve(run_dir), curve(tmp_path / "whole"))


def test_a_run_that_is_told_to_save_saves_and_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, **SLOW)
    wait_for_step(run_dir, 5)
    process.send_signal(signal.SIGUSR1)
    wait_until((run_dir / "last.pt").exists, seconds=30)
    saved = last_step(run_dir)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert 5 <= saved <= last_step(run_dir) == N_STEPS
    assert Run(run_dir).is_done


def test_checkpoints_are_saved_by_time_within_an_epoch(tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, **SLOW | {"config": {"steps": N_STEPS, "save_every": "0.01s"}})
    wait_until((run_dir / "last.pt").exists, seconds=120)
    process.kill()
    process.communicate()
    assert last_step(run_dir) < N_STEPS


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_handlers_of_the_application_are_put_back(toy, tmp_path, handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        pretrain(toy, tmp_path / "run", epochs=1)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("every", "found"), [(7, (7, float("inf"))), ("10min", (None, 600)), ("1.5 h", (None, 5400)), ("30s", (None, 30))]
)
def test_intervals_are_steps_or_times(every, found):
    assert TrainConfig(save_every=every).save_interval() == found


@pytest.mark.parametrize("every", [0, -1, True, 2.5, "10", "0s", "ten minutes", "10 minutes"])
def test_an_interval_that_is_neither_is_an_error(every):
    with pytest.raises(ValueError, match=naming("save_every", repr(every), "s, min or h", "10min")):
        TrainConfig(save_every=every)
