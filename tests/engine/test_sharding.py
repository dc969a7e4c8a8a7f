"""Weights split over two processes: the same losses, and the same checkpoints."""

from __future__ import annotations

import pytest
from engine.runs import agents, curve, pretrain, same_curve, start, wait_for_step, wait_until, workers

from scllm.models.storage import read_torch


@pytest.mark.parametrize("accumulate", [1, 16])
def test_split_weights_give_the_same_losses(toy, tmp_path, accumulate):
    alone = pretrain(toy, tmp_path / "alone", dropout=0.0)
    # 16 parts of 16 cells on two ranks: some parts are empty on one of them
    split = pretrain(
        toy, tmp_path / "split", dropout=0.0, n_procs=2, config={"strategy": "fsdp", "accumulate": accumulate}
    )
    same_curve(curve(tmp_path / "split"), curve(tmp_path / "alone"))
    for name, weight in alone.state_dict().items():
        assert (split.state_dict()[name] - weight).abs().max() < 1e-4, name


def test_a_rank_without_cells_takes_part(toy, tmp_path):
    pretrain(toy, tmp_path / "run", n_procs=2, batch_size=1, epochs=None, config={"strategy": "fsdp", "steps": 3})
    assert (curve(tmp_path / "run")["loss"] > 0).all()


def test_a_killed_run_goes_on_to_the_same_losses(toy, tmp_path):
    settings = {"n_procs": 2, "epochs": 6, "config": {"strategy": "fsdp", "save_every": 3, "accumulate": 2}}
    pretrain(toy, tmp_path / "whole", **settings)
    run_dir = tmp_path / "run"
    process = start(run_dir, data={"n_cells": 120, "n_genes": 40}, **settings)
    wait_for_step(run_dir, 8)
    process.kill()
    process.communicate()
    wait_until(lambda: not workers(run_dir) + agents(run_dir), seconds=10)
    # the checkpoint holds whole weights, as one process writes it
    assert all(weight.shape == pretrained.shape for weight, pretrained in _weights(run_dir, tmp_path / "whole"))
    pretrain(toy, run_dir, **settings)
    same_curve(curve(run_dir), curve(tmp_path / "whole"))


def _weights(*run_dirs):
    first, second = (read_torch(run_dir / "last.pt")["model"] for run_dir in run_dirs)
    assert first.keys() == second.keys()
    return [(first[name], second[name]) for name in first]


def test_half_precision_with_split_weights_is_an_error(toy, tmp_path):
    with pytest.raises(ValueError, match=r"strategy='fsdp' with precision='fp16'.*bf16 or fp32 expected.*Leave"):
        pretrain(toy, tmp_path / "run", n_procs=2, precision="fp16", config={"strategy": "fsdp"})
    assert not (tmp_path / "run").exists()
