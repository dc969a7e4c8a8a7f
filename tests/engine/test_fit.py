"""Results of a run, and their independence of the number of processes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from engine.runs import assert_same_curve, curve, pretrain, workers
from messages import naming

import scllm
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine import loop
from scllm.engine.estimate import matrix_rate
from scllm.engine.predict import predict
from scllm.engine.run import Run
from scllm.models.storage import read_torch


@pytest.fixture(scope="module")
def alone(_toy, tmp_path_factory):
    """A run with one process and without dropout."""
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    adata = _toy.copy()
    return run_dir, pretrain(adata, run_dir, dropout=0.0), adata


def test_two_processes_give_the_same_losses(alone, toy, tmp_path):
    pretrain(toy, tmp_path / "run", dropout=0.0, n_procs=2)
    assert_same_curve(curve(tmp_path / "run"), curve(alone[0]))


@pytest.mark.parametrize("accumulate", [4, 16])
def test_micro_batches_give_the_same_losses(alone, toy, tmp_path, accumulate):
    pretrain(toy, tmp_path / "run", dropout=0.0, config={"accumulate": accumulate})
    assert_same_curve(curve(tmp_path / "run"), curve(alone[0]))


def test_a_file_gives_the_same_losses_for_micro_batches_and_the_same_steps_as_memory(alone, toy, tmp_path):
    toy.write_h5ad(tmp_path / "toy.h5ad")
    for name, accumulate in (("whole", 1), ("parts", 4)):
        pretrain(tmp_path / "toy.h5ad", tmp_path / name, dropout=0.0, config={"accumulate": accumulate})
    whole = curve(tmp_path / "whole")
    assert_same_curve(curve(tmp_path / "parts"), whole)
    # the order of cells is different out of core
    same = ["step", "epoch", "split", "lr", "mask_ratio"]
    pd.testing.assert_frame_equal(whole[same], curve(alone[0])[same])


def test_two_processes_share_a_file_and_batches_smaller_than_their_number(toy, tmp_path):
    toy.write_h5ad(tmp_path / "toy.h5ad")
    model = pretrain(tmp_path / "toy.h5ad", tmp_path / "run", n_procs=2, batch_size=1, epochs=None, config={"steps": 4})
    losses = model.history.loc[model.history["split"] == "train", "loss"]
    assert len(losses) == 4
    assert (losses > 0).all()


def test_history_has_every_loss_of_every_step_and_epoch(alone):
    history = alone[1].history
    training, validation = (history[history["split"] == split] for split in ("train", "validation"))
    per_epoch = math.ceil(108 / 16)
    assert training["step"].tolist() == list(range(1, 3 * per_epoch + 1))
    assert training["epoch"].tolist() == np.repeat([0, 1, 2], per_epoch).tolist()
    assert validation["step"].tolist() == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    terms = ["loss", "mse", "mse_cell", "mse_share", "lr"]
    assert np.isfinite(training[[*terms, "mask_ratio", "grad_norm"]].to_numpy(float)).all()
    assert (training[["grad_norm", "cells_per_s", "tokens_per_s", "peak_memory"]] > 0).all(axis=None)
    assert training["data_wait"].between(0, 1).all()
    # the same step makes all cells and all their tokens
    tokens = training["tokens_per_s"] / training["cells_per_s"]
    assert tokens.between(2, 41).all()
    # the operations of a step are those of its cells, whose lengths differ
    flops = training["mfu"] * matrix_rate(torch.device("cpu"), "fp32") / training["cells_per_s"]
    expected = 3 * tokens.map(alone[1].forward_flops)
    np.testing.assert_allclose(flops, expected, rtol=0.05)
    assert np.isfinite(validation[terms].to_numpy(float)).all()
    assert set(training["mask_ratio"]) == {0.25, 0.5, 0.75}
    np.testing.assert_allclose(history["loss"], history["mse"] + history["mse_cell"])


def test_history_has_one_json_object_per_line_and_is_saved_with_the_model(alone):
    run_dir, model, adata = alone
    lines = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    pd.testing.assert_frame_equal(pd.DataFrame(lines), model.history)
    pd.testing.assert_frame_equal(scllm.models.load(run_dir).history, model.history)
    assert len(adata.uns["scllm"]["pretrain"]["table"]) == len(lines)


def test_the_learning_rate_is_multiplied_by_gamma_each_epoch(alone):
    by_epoch = alone[1].history.groupby("epoch")["lr"].agg(["min", "max"])
    expected = 1e-4 * 0.9 ** np.arange(3)
    np.testing.assert_allclose(by_epoch["min"], expected)
    np.testing.assert_allclose(by_epoch["max"], expected)


def test_the_model_is_that_of_the_best_validation_epoch(toy, tmp_path):
    # the learning rate is so high that the loss rises again
    model = pretrain(toy, tmp_path / "run", lr=3e-2, epochs=8, config={"gamma": 1.5})
    validation = model.history[model.history["split"] == "validation"]
    best = validation.loc[validation["loss"].idxmin()]
    assert best["epoch"] < 7
    shorter = pretrain(toy, tmp_path / "shorter", lr=3e-2, epochs=int(best["epoch"]) + 1, config={"gamma": 1.5})
    for name, weight in read_torch(tmp_path / "run" / "best_model.pt").items():
        assert torch.equal(weight, model.state_dict()[name]), name
        torch.testing.assert_close(weight, shorter.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_without_validation_cells_the_last_weights_are_kept(toy, tmp_path):
    model = pretrain(toy, tmp_path / "run", validation=0)
    assert set(model.history["split"]) == {"train"}
    last = read_torch(tmp_path / "run" / "last.pt")["model"]
    assert all(torch.equal(weight, last[name]) for name, weight in model.state_dict().items())


def test_a_finished_run_has_the_files_that_the_design_lists(alone):
    names = {path.name for path in alone[0].iterdir() if not path.name.startswith(".")}
    assert names == {
        "spec.json", "model", "cells.npz", "best_model.pt", "last.pt", "checkpoints", "history.jsonl", "done",
    }  # fmt: skip


def test_random_states_and_the_given_model_do_not_change(toy, model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    trained = scllm.tl.pretrain(toy, model, device="cpu", run_dir=tmp_path / "run", epochs=1, batch_size=32, lr=1e-2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.history is None
    assert trained.hash() != model.hash()


def test_dropout_depends_on_random_state(toy, tmp_path):
    def trained(name, random_state):
        model = pretrain(toy, tmp_path / name, epochs=1, dropout=0.5, random_state=random_state)
        return model.hash()

    assert trained("a", 1) == trained("b", 1) != trained("c", 2)


def test_patience_is_the_number_of_epochs_without_a_better_loss(toy, tmp_path):
    model = pretrain(toy, tmp_path / "run", lr=3e-2, epochs=20, config={"gamma": 1.5, "patience": 2})
    losses = model.history.loc[model.history["split"] == "validation", "loss"].tolist()
    assert len(losses) < 20
    assert len(losses) - 1 - int(np.argmin(losses)) == 2


def test_validation_can_come_several_times_an_epoch_and_end_the_run_within_one(toy, tmp_path):
    model = pretrain(toy, tmp_path / "all", epochs=1, config={"eval_every": 3})
    assert model.history.loc[model.history["split"] == "validation", "step"].tolist() == [3, 6, 7]
    config = {"gamma": 1.0, "patience": 2, "eval_every": 3}
    model = pretrain(toy, tmp_path / "early", lr=0.1, epochs=20, config=config)
    validation = model.history[model.history["split"] == "validation"]
    assert len(validation) - 1 - int(np.argmin(validation["loss"])) == 2
    assert validation["step"].max() % 7  # not at the end of an epoch
    assert model.history["step"].max() == validation["step"].max() < 140


def test_steps_can_end_a_run_within_an_epoch(toy, tmp_path):
    model = pretrain(toy, tmp_path / "run", epochs=None, config={"steps": 9, "log_every": 4})
    training = model.history[model.history["split"] == "train"]
    assert training["step"].tolist() == [4, 8]
    assert model.history[model.history["split"] == "validation"]["step"].tolist() == [7, 9]


@pytest.mark.filterwarnings("ignore:.*is not finite at step")
@pytest.mark.parametrize("n_procs", [1, 2])
def test_losses_that_stay_not_finite_end_all_processes_before_an_update(toy, tmp_path, n_procs):
    run_dir = tmp_path / "run"
    said = naming("finite", "step 6", "5th step in a row", "checkpoint is step 1", "lr")
    with pytest.raises(RuntimeError, match=said):
        pretrain(toy, run_dir, lr=1e30, n_procs=n_procs, config={"save_every": 1})
    assert read_torch(run_dir / "last.pt")["step"] == 1
    assert curve(run_dir)["step"].tolist() == [1]
    assert not (run_dir / "done").exists()
    assert not workers(run_dir)


@pytest.mark.filterwarnings("ignore:.*is not finite at step")
def test_reading_ahead_stops_after_an_error_whose_traceback_is_kept(toy, model, tmp_path):
    def reading():
        return [thread for thread in threading.enumerate() if thread.name == "scllm-prefetch"]

    with pytest.raises(RuntimeError, match=naming("finite", "step 6")) as training:  # keeps the traceback alive
        pretrain(toy, tmp_path / "run", lr=1e30, batch_size=8)
    assert not reading()

    def fail(replica, batch):
        raise RuntimeError("too large")

    source = open_source(toy)
    match = genes.match(source.genes, model.vocab)
    with pytest.raises(RuntimeError, match="too large") as predicting:
        list(predict(model, source, match, fail, batch_size=1, device="cpu"))
    assert not reading()
    assert training.tb
    assert predicting.tb


def test_a_validation_loss_that_is_not_finite_is_an_error(toy, tmp_path):
    with pytest.raises(RuntimeError, match=naming("validation loss", "nan", "step 1", "lr")):
        pretrain(toy, tmp_path / "run", lr=1e30, batch_size=108)
    assert not (tmp_path / "run" / "best_model.pt").exists()


def test_an_invalid_value_found_during_training_names_the_cell(toy, tmp_path):
    toy.X[57, toy.X[57].indices[0]] = -1
    toy.write_h5ad(tmp_path / "toy.h5ad")
    # raised in the thread that reads ahead
    with pytest.raises(ValueError, match=re.escape("cell57")):
        pretrain(tmp_path / "toy.h5ad", tmp_path / "run")


@pytest.mark.parametrize("validation", [0.1, 0])
def test_modules_are_traversed_once_per_epoch_and_not_in_every_step(toy, tmp_path, monkeypatch, validation):
    walks, walk = [], loop.train_mode
    monkeypatch.setattr(loop, "train_mode", lambda model: walks.append(walk(model)))
    pretrain(toy, tmp_path / "run", validation=validation)
    assert len(curve(tmp_path / "run").query("split == 'train'")) > 3
    assert len(walks) == 3


def test_every_step_is_in_training_mode_except_for_frozen_modules(toy, model, tmp_path, monkeypatch):
    modes, outputs = [], type(model).head_outputs

    def watched(self, batch):
        if torch.is_grad_enabled():
            modes.append((self.training, self.blocks[0].training, self.blocks[1].training))
        return outputs(self, batch)

    monkeypatch.setattr(type(model), "head_outputs", watched)
    options = {"validation": 0.1, "epochs": 2, "device": "cpu", "run_dir": tmp_path / "run"}
    config = scllm.tl.TrainConfig(head_reads="published")
    scllm.tl.finetune(toy, model, key="cell_type", freeze=1, config=config, **options)
    assert len(modes) > 4
    assert set(modes) == {(True, False, True)}


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_the_process_that_trains_can_compute_the_initial_weights(toy, model, tmp_path, monkeypatch, verb):
    """As on several GPUs, where the process that writes the directory leaves them alone."""

    def trained(name):
        if verb == "pretrain":
            return pretrain(toy, tmp_path / name, epochs=1)
        return scllm.tl.finetune(toy, model, key="cell_type", run_dir=tmp_path / name, device="cpu", epochs=1)

    here = trained("here")
    monkeypatch.setattr("scllm.tl._train.Training.starts_here", False)
    there = trained("there")
    assert not (tmp_path / "there" / "unstarted").exists()
    assert_same_curve(curve(tmp_path / "there"), curve(tmp_path / "here"))
    assert there.hash() == here.hash()


def test_a_set_up_that_was_killed_leaves_nothing_that_changes_the_next_one(toy, tmp_path):
    (tmp_path / "left").mkdir()
    for name in ("cells.npz", "reference.npz", "unstarted"):
        (tmp_path / "left" / name).touch()
    assert pretrain(toy, tmp_path / "left", epochs=1).hash() == pretrain(toy, tmp_path / "fresh", epochs=1).hash()


def test_where_the_file_system_has_no_locks_a_file_names_the_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("scllm.engine.run._PATIENCE", 0.3)
    run = Run(tmp_path / "run")
    with run.locked():
        assert str(os.getpid()) in (run.path / ".lock-owner").read_text()
        with pytest.raises(RuntimeError, match=naming(run.path, "one process", os.getpid())), run.locked():
            pass
    assert not (run.path / ".lock-owner").exists()
    # the owner has ended without removing the file
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (run.path / ".lock-owner").write_text(f"{socket.gethostname()} {process.pid}")
    with run.locked():
        assert str(os.getpid()) in (run.path / ".lock-owner").read_text()
