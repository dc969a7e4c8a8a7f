"""Runs that are killed, at any step and in any process, and resumed by the same call."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engine.runs import (
    agents,
    assert_same_curve,
    curve,
    interrupted,
    pretrain,
    start,
    wait_for_step,
    wait_until,
    workers,
)
from messages import naming

import scllm
from scllm.data.run_files import write_json
from scllm.engine.launch import launch
from scllm.engine.run import Run
from scllm.engine.worker import continue_run

# 84 steps, because on a busy machine a run gets far before a test notices that it has reached a step
LONG = {"epochs": 12, "dropout": 0.2, "config": {"save_every": 3}}


@pytest.fixture(scope="module")
def expected(_toy, tmp_path_factory):
    """The history of an uninterrupted run with dropout, by number of processes."""

    def run(n_procs):
        if n_procs not in found:
            run_dir = tmp_path_factory.mktemp("runs") / "whole"
            pretrain(_toy.copy(), run_dir, n_procs=n_procs, **LONG)
            found[n_procs] = curve(run_dir)
        return found[n_procs]

    found = {}
    return run


class KillerAt(threading.Thread):
    """Kill one of the processes of a run as soon as it has reached a step."""

    def __init__(self, run_dir, step, choose):
        super().__init__()
        self.run_dir, self.step, self.choose = run_dir, step, choose
        self.start()

    def run(self):
        wait_for_step(self.run_dir, self.step)
        # the step may be in the history before the processes that resume it have started
        wait_until(lambda: self.choose(self.run_dir), seconds=60)
        os.kill(self.choose(self.run_dir)[-1], signal.SIGKILL)


def test_a_run_killed_three_times_has_the_history_of_an_uninterrupted_run(expected, tmp_path):
    run_dir = tmp_path / "run"
    steps = np.sort(np.random.default_rng(0).choice(np.arange(1, 40), 3, replace=False))
    for step in steps:
        process = start(run_dir, **LONG)
        wait_for_step(run_dir, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not Run(run_dir).is_done
    process = start(run_dir, **LONG)
    assert process.wait() == 0, process.stdout.read()
    process.communicate()
    assert Run(run_dir).is_done
    found = curve(run_dir)
    assert not found.duplicated(["step", "split"]).any()
    assert_same_curve(found, expected(1))


def test_two_processes_killed_in_every_way_resume_to_the_same_history(expected, toy, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, n_procs=2, **LONG)
    wait_for_step(run_dir, 4)
    assert len(workers(run_dir)) == 2
    process.kill()
    process.communicate()
    # the process that started them has ended: they stop training, and the lock is released when they have ended
    wait_until(lambda: not workers(run_dir) + agents(run_dir), seconds=10)

    for step, choose in ((20, workers), (35, agents)):
        killer = KillerAt(run_dir, step, choose)
        with pytest.raises(RuntimeError, match=naming(run_dir, "exit status", "log.txt")):
            pretrain(toy, run_dir, n_procs=2, **LONG)
        killer.join()
        wait_until(lambda: not workers(run_dir) + agents(run_dir), seconds=10)
        assert not Run(run_dir).is_done

    pretrain(toy, run_dir, n_procs=2, **LONG)
    assert Run(run_dir).is_done
    assert_same_curve(curve(run_dir), expected(2))


def test_a_second_call_is_an_error_and_an_interrupt_ends_all_processes(toy, tmp_path):
    run_dir, endless = tmp_path / "run", LONG | {"epochs": 1000}
    process = start(run_dir, n_procs=2, **endless)
    wait_for_step(run_dir, 2)
    with pytest.raises(RuntimeError, match=naming(run_dir, "one process")):
        pretrain(toy, run_dir, **endless)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output.rstrip().endswith("KeyboardInterrupt")
    assert not workers(run_dir) + agents(run_dir)


def test_a_run_can_be_resumed_with_another_number_of_processes(toy, tmp_path):
    run_dir, plain = tmp_path / "run", LONG | {"dropout": 0.0}
    pretrain(toy, tmp_path / "whole", **plain)
    interrupted(toy, run_dir, 9, **plain)
    pretrain(toy, run_dir, n_procs=2, **plain)
    assert_same_curve(curve(run_dir), curve(tmp_path / "whole"))


def test_a_file_gives_the_same_losses_in_1_and_4_processes_and_in_2_that_were_killed(toy, tmp_path):
    file = tmp_path / "toy.h5ad"
    toy.write_h5ad(file)
    # a buffer of six of the seven batches of an epoch; 27 shards divide among neither 2 nor 4 processes
    config = {"steps": 42, "save_every": 4, "shuffle_cells": 96, "n_shards": 27}
    settings = {"epochs": None, "dropout": 0.0, "precision": "fp32", "config": config}
    for n_procs in (1, 4):
        pretrain(file, tmp_path / f"{n_procs}", n_procs=n_procs, **settings)
    alone = curve(tmp_path / "1")
    assert (alone["split"] == "train").sum() == 42
    assert_same_curve(curve(tmp_path / "4"), alone)
    killer = KillerAt(tmp_path / "2", 10, workers)
    with pytest.raises(RuntimeError, match="exit status"):
        pretrain(file, tmp_path / "2", n_procs=2, **settings)
    killer.join()
    in_two = curve(tmp_path / "2")
    assert_same_curve(in_two, alone[: len(in_two)])
    with pytest.raises(ValueError, match=naming("train.n_shards", 27, 64)):
        pretrain(file, tmp_path / "2", **settings | {"config": config | {"n_shards": 64}})
    pretrain(file, tmp_path / "2", **settings)
    assert_same_curve(curve(tmp_path / "2"), alone)


@pytest.fixture
def killed(toy, tmp_path):
    """A run on a file that was killed before it was done."""
    toy.write_h5ad(tmp_path / "toy.h5ad")
    process = start(tmp_path / "run", data=tmp_path / "toy.h5ad", **LONG)
    wait_for_step(tmp_path / "run", 5)
    process.kill()
    process.communicate()
    return tmp_path / "run"


def test_a_run_can_be_resumed_after_its_data_were_moved(killed, tmp_path):
    pretrain((tmp_path / "toy.h5ad").rename(tmp_path / "moved.h5ad"), killed, **LONG)
    # other processes look for the data there
    assert Run(killed).spec.data_reference == str(tmp_path / "moved.h5ad")


def test_a_run_cannot_be_resumed_with_other_cells(toy, killed, tmp_path):
    toy[::-1].copy().write_h5ad(tmp_path / "toy.h5ad")
    again = subprocess.run([sys.executable, "-m", "scllm", "run", killed], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert re.search(naming(tmp_path / "toy.h5ad", killed, "fingerprint"), again.stderr)
    assert not Run(killed).is_done


def test_the_command_line_resumes_a_run(expected, toy, tmp_path):
    run_dir = tmp_path / "run"
    interrupted(toy, run_dir, 5, **LONG)
    subprocess.run([sys.executable, "-m", "scllm", "run", run_dir], check=True, capture_output=True)
    assert_same_curve(curve(run_dir), expected(1))


def test_a_process_that_torchrun_started_by_hand_locks_the_run(toy, tmp_path):
    run_dir = tmp_path / "run"
    interrupted(toy, run_dir, 1, **LONG)
    first_rank = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with Run(run_dir).locked():
        second = subprocess.run(
            [sys.executable, "-m", "scllm", "run", run_dir], env=first_rank, capture_output=True, text=True
        )
    assert second.returncode != 0
    assert re.search(naming(run_dir, "one process"), second.stderr)


def contents(folder):
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_run_with_other_settings_is_an_error_that_names_them_and_changes_nothing(toy, tmp_path):
    run_dir = tmp_path / "run"
    pretrain(toy, run_dir, epochs=1)
    before = contents(run_dir)
    with pytest.raises(ValueError, match=naming(run_dir, "train.epochs was 1, now 2", "train.lr was 0.0001, now 0.1")):
        pretrain(toy, run_dir, epochs=2, lr=0.1)
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        pretrain(toy[:100].copy(), run_dir, epochs=1)
    with pytest.raises(ValueError, match="weights"):
        pretrain(toy, run_dir, epochs=1, random_state=1)
    assert contents(run_dir) == before


def test_some_settings_may_change_while_a_run_has_not_finished(toy, tmp_path, caplog):
    run_dir, before = tmp_path / "run", {"epochs": 2, "dropout": 0.0}
    interrupted(toy, run_dir, 9, config={"save_every": 3}, **before)
    pretrain(toy, run_dir, lr=1e-2, config={"clip": None, "log_every": 2}, **before)
    assert re.search(naming("lr=0.01", 0.0001), caplog.text)
    assert Run(run_dir).spec.train.lr == 0.01
    logged = set(curve(run_dir).query("split == 'train'")["step"])
    assert {*range(1, 10), 14} <= logged
    assert 13 not in logged
    # the result does not depend on how often checkpoints were saved, but it does on the learning rate
    pretrain(toy, run_dir, lr=1e-2, config={"clip": None, "save_every": 5}, **before)
    with pytest.raises(ValueError, match=naming("train.lr", 0.01, 0.0001)):
        pretrain(toy, run_dir, config={"clip": None}, **before)


def test_a_run_that_is_done_is_returned_at_once(toy, tmp_path):
    run_dir = tmp_path / "run"
    first = pretrain(toy, run_dir, epochs=1)
    before = contents(run_dir)
    again = pretrain(toy, run_dir, epochs=1, n_procs=2)  # starting two processes would take seconds
    assert again.hash() == first.hash()
    assert contents(run_dir) == before


@pytest.mark.parametrize("how", ["verb", "torchrun"])
def test_a_run_that_another_process_finished_meanwhile_is_not_changed(toy, tmp_path, monkeypatch, how):
    run = Run(tmp_path / "run")
    model = pretrain(toy, run.path, epochs=1)
    before = contents(run.path)
    (run.path / "done").rename(tmp_path / "done")
    taken = threading.Event()

    def finish():
        with run.locked():
            taken.set()
            time.sleep(1)
            (tmp_path / "done").rename(run.path / "done")

    other = threading.Thread(target=finish)
    other.start()
    taken.wait()
    if how == "verb":
        assert launch(run, n_procs=1, device="cpu").hash() == model.hash()
    else:
        monkeypatch.setenv("RANK", "0")
        continue_run(run, device="cpu")
    other.join()
    after = contents(run.path)
    del before[Path(".lock")], after[Path(".lock")]
    assert after == before


def test_a_run_that_began_without_loss_scaling_can_be_resumed_in_half_precision(toy, tmp_path, caplog):
    run = Run(tmp_path / "run")
    interrupted(toy, run.path, 9, **LONG)
    # as with precision='auto' on another device
    spec = run.spec
    spec = replace(spec, train=replace(spec.train, precision="fp16", epochs=3))
    write_json(run.path / "spec.json", spec.to_json())
    with caplog.at_level("INFO", logger="scllm"):
        continue_run(run, device="cpu")
    assert re.search(naming("fp16", "fp32"), caplog.text)
    assert (curve(run.path)["loss"] > 0).all()
    assert len(curve(run.path)) == 3 * 7 + 3


def test_long_settings_are_cut_in_the_message(toy, tmp_path):
    run = Run(tmp_path / "run")
    pretrain(toy, run.path, epochs=1)
    spec = replace(run.spec, heads=[f"type {i}" for i in range(100)])
    write_json(run.path / "spec.json", spec.to_json())
    with pytest.raises(ValueError, match=r": heads was .{60}, now .{60}; verb was 'pretrain', now 'finetune'\. "):
        run.check(replace(spec, heads=[f"other {i}" for i in range(100)], verb="finetune"))


def test_resume_can_be_required_or_forbidden(toy, tmp_path):
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "resume=True", "resume='auto'")):
        pretrain(toy, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    pretrain(toy, tmp_path / "run", epochs=1, resume=False)
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "resume=False")):
        pretrain(toy, tmp_path / "run", epochs=1, resume=False)


def test_a_run_that_was_stopped_during_setup_starts_again(toy, tmp_path):
    run_dir = tmp_path / "run"
    large = scllm.datasets.toy(n_cells=4000, n_genes=40)
    interrupted(large, run_dir, (run_dir / "data").exists)
    assert not (run_dir / "spec.json").exists()
    assert len(pretrain(toy, run_dir, epochs=1).history) == 8


def test_a_process_that_fails_after_the_run_is_done_is_a_warning(toy, tmp_path, monkeypatch):
    # every worker exits with status 3 after its work, because workers sometimes abort while exiting
    exiting = "import atexit, os\nif 'LOCAL_RANK' in os.environ: atexit.register(os._exit, 3)\n"
    (tmp_path / "sitecustomize.py").write_text(exiting)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.warns(UserWarning, match=naming(tmp_path / "run", "exit status 1", "complete")):
        model = pretrain(toy, tmp_path / "run", epochs=1, n_procs=2)
    assert scllm.models.load(tmp_path / "run").hash() == model.hash()


@pytest.mark.slow
def test_soak_two_processes_start_and_finish_repeatedly(toy, tmp_path):
    for i in range(int(os.environ.get("SCLLM_SOAK", "3"))):
        run_dir = tmp_path / f"run{i}"
        model = pretrain(toy, run_dir, n_procs=2, epochs=1)
        assert Run(run_dir).is_done
        assert len(model.history) == 8
        assert not workers(run_dir) + agents(run_dir)
