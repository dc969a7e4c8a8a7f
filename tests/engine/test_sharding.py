"""Weights sharded over two processes: the same losses and the same checkpoints."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from engine.runs import agents, assert_same_curve, curve, pretrain, start, wait_for_step, wait_until, workers
from messages import naming
from torch import distributed

from scllm import models
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine import sharding
from scllm.engine.loader import Loader
from scllm.engine.objectives import Label, objective_from_dict
from scllm.models.base import HeadSpec


@pytest.mark.parametrize("accumulate", [1, 16])
def test_sharded_weights_give_the_same_losses(toy, tmp_path, accumulate):
    alone = pretrain(toy, tmp_path / "alone", dropout=0.0)
    # 16 micro-batches of 16 cells on two ranks: some are empty on one of the ranks
    split = pretrain(
        toy, tmp_path / "split", dropout=0.0, n_procs=2, config={"strategy": "fsdp", "accumulate": accumulate}
    )
    assert_same_curve(curve(tmp_path / "split"), curve(tmp_path / "alone"))
    for name, weight in alone.state_dict().items():
        assert (split.state_dict()[name] - weight).abs().max() < 1e-4, name


def test_a_rank_without_cells_takes_part_in_training(toy, tmp_path):
    pretrain(toy, tmp_path / "run", n_procs=2, batch_size=1, epochs=None, config={"strategy": "fsdp", "steps": 3})
    assert (curve(tmp_path / "run")["loss"] > 0).all()


def test_a_killed_run_resumes_to_the_same_losses(toy, tmp_path):
    settings = {"n_procs": 2, "epochs": 6, "config": {"strategy": "fsdp", "save_every": 3, "accumulate": 2}}
    pretrain(toy, tmp_path / "whole", **settings)
    run_dir = tmp_path / "run"
    process = start(run_dir, data={"n_cells": 120, "n_genes": 40}, **settings)
    wait_for_step(run_dir, 8)
    process.kill()
    process.communicate()
    wait_until(lambda: not workers(run_dir) + agents(run_dir), seconds=10)
    # every rank has written its part, and the parts make complete weights
    assert len(list((run_dir / "last.pt").glob("*.safetensors"))) == 2
    whole, killed = (models.load(path, checkpoint="last") for path in (tmp_path / "whole", run_dir))
    shapes = {name: weight.shape for name, weight in whole.state_dict().items()}
    assert {name: weight.shape for name, weight in killed.state_dict().items()} == shapes
    pretrain(toy, run_dir, **settings)
    assert_same_curve(curve(run_dir), curve(tmp_path / "whole"))


def test_sharded_runs_resume_on_any_number_of_processes(toy, tmp_path):
    settings = {"epochs": 4, "dropout": 0.0, "config": {"strategy": "fsdp", "save_every": 3}}
    pretrain(toy, tmp_path / "whole", **settings)
    run_dir = tmp_path / "run"
    for n_procs, step in ((2, 5), (1, 11), (2, 18)):
        process = start(run_dir, n_procs=n_procs, **settings)
        wait_for_step(run_dir, step)
        process.kill()
        process.communicate()
        wait_until(lambda: not workers(run_dir) + agents(run_dir), seconds=10)
        assert not (run_dir / "done").exists()
    pretrain(toy, run_dir, **settings)
    assert_same_curve(curve(run_dir), curve(tmp_path / "whole"))


def test_shards_that_are_truncated_are_passed_over_for_the_checkpoint_before(toy, tmp_path):
    settings = {"epochs": 2, "dropout": 0.0, "config": {"strategy": "fsdp", "save_every": 3}}
    pretrain(toy, tmp_path / "run", **settings)
    whole = curve(tmp_path / "run")
    (tmp_path / "run" / "done").unlink()
    (shard,) = (tmp_path / "run" / "last.pt").glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.warns(UserWarning, match=naming("step-14", "truncated", "step 12")):
        pretrain(toy, tmp_path / "run", **settings)
    assert_same_curve(curve(tmp_path / "run"), whole)


def test_bf16_with_sharded_weights_differs_by_rounding_only(toy, tmp_path):
    settings = {"epochs": 2, "dropout": 0.0, "n_procs": 2, "precision": "bf16"}
    for strategy in ("ddp", "fsdp"):
        pretrain(toy, tmp_path / strategy, config={"strategy": strategy}, **settings)
    one, other = (curve(tmp_path / strategy)["loss"] for strategy in ("ddp", "fsdp"))
    np.testing.assert_allclose(one, other, rtol=1e-2)


def test_half_precision_with_sharded_weights_is_an_error(toy, tmp_path):
    with pytest.raises(ValueError, match=naming("fsdp", "fp16", "bf16", "fp32")):
        pretrain(toy, tmp_path / "run", n_procs=2, precision="fp16", config={"strategy": "fsdp"})
    assert not (tmp_path / "run").exists()


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone; its weights are sharded as in any group."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def batches(adata, model, objective):
    """A batch of four cells, and an empty batch."""
    source = open_source(adata)
    obs = {"label:cell_type": adata.obs["cell_type"].cat.codes.to_numpy(np.int64)}
    whole = getattr(objective, "predicts_whole_cells", False)
    cells = Loader(
        source, np.arange(4), genes.match(source.genes, model.vocab), model.encoder, model.vocab, 4, obs=obs,
        keep_whole=whole, keep_empty=True,
    )  # fmt: skip
    (some,), (none, *_) = next(cells.epoch(0)), next(cells.epoch(0, parts=5))
    assert (some.n_cells, none.n_cells) == (4, 0)
    return some, none


def gradients(model, objective, batch):
    model.zero_grad()
    loss = objective(model, batch, 0).sum
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), {name: getattr(grad, "full_tensor", lambda g=grad: g)() for name, grad in found.items()}


@pytest.mark.parametrize("task", ["pretraining", "labels"])
@pytest.mark.parametrize("family", sorted(set(models.families()) - {"spatial"}))
def test_every_family_trains_with_sharded_weights_and_takes_part_without_cells(toy, one_rank, family, task):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build(family, vocab=toy.var_names, size="tiny", dropout=0.0)
        reads = "last" if model.head_pooling is None else "both"
        model.set_heads([HeadSpec("cell_type", ("A", "B", "C", "D"), pooling=model.head_pooling, reads=reads)])
    objective = Label() if task == "labels" else objective_from_dict(model.config.objective())
    some, none = batches(toy, model, objective)
    split = copy.deepcopy(model)
    sharding.shard(split)
    expected_loss, expected = gradients(model, objective, some)
    loss, found = gradients(split, objective, some)
    assert loss == pytest.approx(expected_loss)
    torch.testing.assert_close(found, expected)
    assert sharding.weights(split).keys() == model.state_dict().keys()
    # gradients for the same weights as on ranks with cells, because they are summed over ranks
    for one in (model, split):
        loss, nothing = gradients(one, objective, none)
        assert loss == 0
        assert nothing.keys() == expected.keys()
        assert not any(grad.any() for grad in nothing.values())
