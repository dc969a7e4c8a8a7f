"""Gene language models through the verbs that all families share."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from messages import naming

from scllm import datasets, models
from scllm.tl import TrainConfig, classify, embed, embed_genes, finetune, pretrain, reconstruct

FAMILIES = ("gpt2", "albert", "xlnet")
every_family = pytest.mark.parametrize("family", FAMILIES)
QUICK = {"epochs": 2, "batch_size": 16, "lr": 2e-3, "device": "cpu"}


@pytest.fixture(scope="module")
def _cells():
    return datasets.toy(n_cells=96, n_genes=30)


@pytest.fixture
def cells(_cells):
    return _cells.copy()


@pytest.fixture(scope="module")
def _fresh(_cells):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "max_len": 31}
        return {family: models.build(family, vocab=_cells.var_names, **sizes) for family in FAMILIES}


@pytest.fixture
def fresh(_fresh):
    return copy.deepcopy(_fresh)


@every_family
def test_pretraining_lowers_the_loss_and_goes_on_where_it_was(cells, family, tmp_path):
    model = pretrain(cells, family, size="tiny", run_dir=tmp_path / "run", **QUICK | {"epochs": 4})
    losses = model.history.query("split == 'validation'")["loss"].to_numpy()
    assert losses[-1] < losses[0]
    assert {"step", "epoch", "split", "loss", "lr", "cells_per_s"} <= set(model.history.columns)
    again = pretrain(cells, family, size="tiny", run_dir=tmp_path / "run", **QUICK | {"epochs": 4})
    assert again.hash() == model.hash()
    embed(cells, model)
    assert cells.obsm["X_scllm"].shape == (96, 64)


@every_family
def test_accumulated_parts_give_the_same_curve(cells, fresh, family):
    curves = [
        pretrain(cells, fresh[family], dropout=0.0, config=TrainConfig(accumulate=parts), **QUICK).history["loss"]
        for parts in (1, 4)
    ]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)


@every_family
@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"freeze": 1}, TrainConfig()),
        ({"lora": 2}, TrainConfig()),
        ({}, TrainConfig(layer_decay=0.5, checkpointing=True)),
    ],
)
def test_finetuning_with_frozen_blocks_adapters_and_layer_decay(cells, fresh, family, options, config):
    model = fresh[family]
    tuned = finetune(cells, model, key="cell_type", config=config, validation=0, **QUICK, **options)
    before, after = model.state_dict(), tuned.state_dict()
    first = {id(weight) for weight in model.blocks[0].parameters()}
    frozen = {name for name, weight in model.named_parameters() if id(weight) in first}
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed
    if "freeze" in options:
        assert not changed & frozen
    if "lora" in options:
        assert changed & frozen
        assert "network" in next(iter(changed))
        assert torch.equal(model.gene_table(), tuned.gene_table())
    classify(cells, tuned)
    assert cells.obs["scllm_label"].notna().all()


@every_family
def test_genes_are_embedded_and_reconstructed(cells, fresh, family):
    embed_genes(cells, fresh[family])
    embed_genes(cells, fresh[family], contextual=True, key_added="contextual")
    assert cells.varm["contextual"].shape == (30, 16)
    np.testing.assert_array_equal(cells.varm["scllm_genes"], fresh[family].gene_table().detach()[:30])
    reconstruct(cells, fresh[family], mask_ratio=0.3)
    shares = cells.layers["reconstructed"].data
    assert ((shares > 0) & (shares < 1)).all()


def test_shares_of_hidden_genes_go_to_models_that_hide_genes(cells, fresh):
    model = pretrain(cells, fresh["albert"], mask_ratio=0.4, **QUICK)
    assert model.history["loss"].notna().all()
    with pytest.raises(TypeError, match=naming("mask_ratio=(0.3,)", "gpt2", "NextGene")):
        pretrain(cells, fresh["gpt2"], mask_ratio=0.3, **QUICK)
    with pytest.raises(TypeError, match=naming("left_out=0.1", "xlnet", "PermutedGene")):
        pretrain(cells, fresh["xlnet"], left_out=0.1, **QUICK)
