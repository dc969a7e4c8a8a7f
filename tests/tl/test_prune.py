"""Functions of tl with pruned models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from messages import naming

from scllm import models, tl


def test_the_model_really_shrinks(adata, tiny, tmp_path):
    before = tiny.hash()
    small = tl.prune(tiny, amount=0.5, structured=True)
    assert small.config.block_heads == (1, 1)
    assert small.config.block_hidden == (8, 8)
    ratio = small.report.loc["after"] / small.report.loc["before"]
    assert ratio["n_parameters"] < 0.9
    assert ratio["bytes_on_disk"] < 0.9
    assert ratio["flops_per_cell"] == pytest.approx(0.5, abs=0.01)
    assert tiny.hash() == before
    assert tiny.config.block_heads is None
    small.save(tmp_path / "model")
    assert models.load(tmp_path / "model").report.equals(small.report)


def test_unstructured_pruning_keeps_the_shape(tiny):
    small = tl.prune(tiny, amount=0.4)
    assert small.config == replace(tiny.config, zeros_stay=True)
    assert (small.layers[0].up.weight == 0).float().mean() == pytest.approx(0.4, abs=0.01)
    assert small.report["n_parameters"].nunique() == 1


def test_pruned_models_can_be_fine_tuned(adata, tiny):
    small = tl.prune(tiny, amount=0.5, structured=True)
    tuned = tl.finetune(adata, small, key="cell_type", epochs=12, lr=1e-3)
    with pytest.warns(UserWarning, match=naming("head", "'cell_type'", "tl.finetune")):
        tl.prune(tuned, structured=True)
    assert tuned.config.block_heads == (1, 1)
    assert tuned.report is None
    losses = tuned.history.query("split == 'train'")["loss"]
    assert losses.iloc[-2:].mean() < 0.9 * losses.iloc[:2].mean()
    assert not torch.equal(tuned.layers[0].attention.out.weight, small.layers[0].attention.out.weight)


@pytest.mark.parametrize("processes", [{}, {"n_procs": 2}, {"n_procs": 2, "config": tl.TrainConfig(strategy="fsdp")}])
def test_pruned_weights_stay_zero_in_training(adata, tiny, tmp_path, processes):
    small = tl.prune(tiny, amount=0.4)
    tuned = tl.finetune(adata, small, key="cell_type", epochs=3, lr=1e-3, run_dir=tmp_path / "run", **processes)
    for before, after in zip(small.layers, models.load(tmp_path / "run" / "model").layers, strict=True):
        for name in ("attention.qkv", "attention.out", "up", "down"):
            old, new = before.get_submodule(name).weight, after.get_submodule(name).weight
            torch.testing.assert_close(new == 0, old == 0, rtol=0, atol=0)
            assert not torch.equal(new, old)
    assert "pruned" in repr(tuned)
    assert (tl.finetune(adata, tiny, key="cell_type", epochs=1).layers[0].up.weight != 0).all()


def test_adapters_of_a_pruned_model_are_trained(adata, tiny):
    small = tl.prune(tiny, amount=0.4)
    tuned = tl.finetune(adata, small, key="cell_type", epochs=3, lr=1e-2, lora=2)
    for before, after in zip(small.layers, tuned.layers, strict=True):
        for name in ("attention.qkv", "attention.out", "up", "down"):
            changed = before.get_submodule(name).weight != after.get_submodule(name).weight
            assert changed.float().mean() > 0.9


def test_amounts_that_round_to_zero_are_an_error(tiny):
    with pytest.raises(ValueError, match=naming("amount", "0.01")):
        tl.prune(tiny, amount=0.01, structured=True)


def test_prune_then_quantize(tiny, tmp_path):
    small = tl.quantize(tl.prune(tiny, amount=0.5, structured=True))
    small.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert again.hash() == small.hash()
    assert (again.weight_dtype, again.config.block_heads) == ("int8", (1, 1))
    assert again.layers[0].attention.qkv.weight_int8.dtype == torch.int8
    with pytest.raises(ValueError, match=naming("float weights", "int8", "quantize")):
        tl.prune(again)


@pytest.mark.parametrize("amount", [0, 1, -0.1, 30, "0.3", None])
def test_amounts_are_between_0_and_1(tiny, amount):
    with pytest.raises(ValueError, match=naming("amount", f"got {amount!r}")):
        tl.prune(tiny, amount=amount)


def test_structured_is_a_switch() -> None:
    with pytest.raises(TypeError, match=naming("structured", "'no'", True, False)):
        tl.prune("a model", structured="no")
