"""How much of a cell is read in training, and that families learn what they shall from a random subset."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from scllm import datasets, models, tl
from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.engine.objectives.masked_expression import _with_unread
from scllm.models.scbert import PositionHead

FAMILIES = ("scgpt", "geneformer", "scbert", "scfoundation", "gpt2", "albert", "xlnet")


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_and_small_models_train_on_512_tokens_and_published_ones_on_all(family):
    module = models.family_module(family)
    lengths = {size: models.training_length(family, module.Config(**fields)) for size, fields in module.SIZES.items()}
    assert lengths.pop("tiny") == lengths.pop("small") == 512
    assert set(lengths.values()) == {None}


def test_pretraining_and_finetuning_read_a_subset_unless_told_otherwise(tmp_path):
    adata = datasets.toy(n_cells=60)

    def read(name):
        return json.loads((tmp_path / name / "spec.json").read_text())["train"]["max_len"]

    whole = tl.TrainConfig(max_len=100_000, steps=1)
    model = tl.pretrain(adata, size="tiny", run_dir=tmp_path / "a", config=tl.TrainConfig(steps=1))
    tl.pretrain(adata, size="tiny", run_dir=tmp_path / "b", config=whole)
    tl.finetune(adata, model, key="cell_type", run_dir=tmp_path / "c", config=tl.TrainConfig(steps=1))
    tl.finetune(adata, model, key="cell_type", run_dir=tmp_path / "d", config=whole)
    tl.pretrain(adata, size="tiny", run_dir=tmp_path / "e", config=tl.TrainConfig(steps=1, relational=False))
    assert [read(name) for name in "abcde"] == [256, 100_000, 512, 100_000, 512]
    assert model.encoder.max_len == 1201  # embedding reads all


@pytest.fixture(scope="module")
def cells():
    return datasets.toy(n_cells=20, n_genes=120)


def training_batches(cells, model, max_len, n_epochs):
    source = open_source(cells)
    matched = match(cells.var_names, model.vocab)
    loader = Loader(
        source, np.arange(cells.n_obs), matched, replace(model.encoder, max_len=max_len), model.vocab, cells.n_obs,
        keep_whole=True,
    )  # fmt: skip
    return [batch for epoch in range(n_epochs) for batches in loader.epoch(epoch) for batch in batches]


def test_a_head_on_all_positions_reads_as_much_of_subsets_as_of_whole_cells(cells):
    model = models.build("scbert", vocab=cells.var_names, size="tiny")
    head = PositionHead(len(model.vocab), model.config.d_model, (4, 4), 2)
    # what goes into the first layer over positions comes out
    head.position, head.up, head.narrow, head.out = (nn.Identity() for _ in range(4))
    total = torch.zeros(cells.n_obs, len(model.vocab))
    batches = training_batches(cells, model, 31, 200)
    for batch in batches:
        total += head(torch.ones(len(batch.genes), 1), batch)
    mean = total / len(batches)
    assert mean[:, :-1].mean() == pytest.approx(1, abs=0.01)
    assert mean[:, :-1].std() < 0.2
    assert (mean[:, -1] == 1).all()  # <eos> is there each time


def test_genes_that_a_subset_leaves_out_are_hidden_from_the_decoder_and_not_zero(cells):
    model = models.build("scfoundation", vocab=cells.var_names, size="tiny")
    none = torch.zeros(0, dtype=torch.long)
    n_hidden = n_zeros = 0
    for batch in training_batches(cells, model, 12, 10):
        cell, gene, value = _with_unread(batch, (none, none, torch.zeros(0)), model)
        assert (value == model.config.mask_value).all()
        hidden = torch.zeros(batch.n_cells, len(model.vocab), dtype=torch.bool)
        hidden[cell, gene] = True
        read, expressed = torch.zeros_like(hidden), torch.zeros_like(hidden)
        read[batch.cell, batch.genes] = True
        expressed[batch.whole.cell, batch.whole.genes] = True
        assert not (hidden & read).any()
        assert (hidden | read)[expressed].all()
        n_zeros += int((~expressed[:, : cells.n_vars]).sum())
        n_hidden += int((hidden & ~expressed).sum())
        share = 1 - (1 / batch.spacing).mean()
    # genes that are not expressed are hidden as often as others are left out
    assert n_hidden / n_zeros == pytest.approx(float(share), abs=0.05)


def test_whole_cells_hide_nothing_from_the_decoder(cells):
    model = models.build("scfoundation", vocab=cells.var_names, size="tiny")
    none = torch.zeros(0, dtype=torch.long)
    for batch in training_batches(cells, model, 122, 1):
        assert len(_with_unread(batch, (none, none, torch.zeros(0)), model)[0]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_a_random_subset(cells, family, tmp_path):
    config = tl.TrainConfig(max_len=20)
    model = tl.pretrain(
        cells, family, size="tiny", run_dir=tmp_path / "run", epochs=8, batch_size=10, lr=3e-3, validation=0.2,
        config=config,
    )  # fmt: skip
    losses = model.history.query("split == 'validation'")["loss"]
    assert losses.min() < losses.iloc[0]
