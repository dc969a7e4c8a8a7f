"""Packed batches and pooling, against padded ones and one cell at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData
from messages import naming

from scllm import models
from scllm.data.tokens import Tokens
from scllm.models.base import Batch, CellModel

LENGTHS = (3, 1, 5)


@pytest.fixture
def batch() -> Batch:
    indptr = np.concatenate([[0], np.cumsum(LENGTHS)])
    genes = np.array([9, 0, 1, 9, 9, 2, 3, 4, 5])  # 9 is <cls>
    return Batch.from_tokens(Tokens(indptr, genes, np.arange(9, dtype=np.float32)), keys=np.array([5, 6, 7]))


@pytest.fixture
def model():
    return models.build("scgpt", vocab=[f"g{i}" for i in range(9)], n_layers=2, n_heads=2, d_model=8, d_hidden=8).eval()


def test_a_packed_batch_knows_its_cells(batch):
    assert batch.n_cells == 3
    assert batch.first.tolist() == [0, 3, 4]
    assert batch.cell.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]


def test_padding_lays_cells_out_in_rows(batch):
    genes, values, padding = batch.padded(pad_id=10, pad_value=-2)
    assert genes.tolist() == [[9, 0, 1, 10, 10], [9, 10, 10, 10, 10], [9, 2, 3, 4, 5]]
    assert values.tolist() == [[0, 1, 2, -2, -2], [3, -2, -2, -2, -2], [4, 5, 6, 7, 8]]
    assert padding.sum(1).tolist() == [2, 4, 0]


@torch.no_grad()
def test_cells_of_a_batch_do_not_see_each_other(model, batch):
    together = model.hidden(batch)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = Batch.from_tokens(Tokens(np.array([0, length]), batch.genes[rows].numpy(), batch.values[rows].numpy()))
        torch.testing.assert_close(model.hidden(alone), together[rows], atol=1e-6, rtol=0)
        start += length


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_the_state_of_cls_alone_is_that_among_all(model, batch, layer):
    whole = model.hidden(batch, layer=layer)
    torch.testing.assert_close(model.hidden(batch, layer=layer, first_only=True), whole[batch.first], atol=1e-6, rtol=0)


def test_pooling_leaves_specials_out_and_gives_zeros_without_genes(model, batch):
    hidden = torch.arange(18.0).view(9, 2) - 9
    assert model.pool(hidden, batch, "cls").tolist() == hidden[[0, 3, 4]].tolist()
    expected = [hidden[1:3].mean(0).tolist(), [0, 0], hidden[5:].mean(0).tolist()]
    assert model.pool(hidden, batch, "mean").tolist() == expected
    expected = [hidden[1:3].amax(0).tolist(), [0, 0], hidden[5:].amax(0).tolist()]
    assert model.pool(hidden, batch, "max").tolist() == expected


@pytest.mark.parametrize("pooling", ["mean", "ranked", "linear"])
def test_means_of_long_cells_are_as_good_in_half_precision_as_one_rounding(model, pooling):
    values = torch.arange(2_000, 0, -1, dtype=torch.float32)
    cell = Batch.from_tokens(Tokens(np.array([0, 2_000]), np.arange(2_000) % 9, values.numpy()))
    hidden = (1 + torch.rand(2_000, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact = model.pool(hidden.double().float(), cell, pooling)
    torch.testing.assert_close(model.pool(hidden, cell, pooling).float(), exact, rtol=2**-8, atol=0)


def test_the_repr_says_what_the_model_is(model):
    text = repr(model)
    for part in ("scgpt model: 2 layers x 2 heads x 8", "9 genes (g0, g1, g2", "BinEncoder(n_bins=51"):
        assert part in text


def test_what_a_family_does_not_define_is_named(model, batch):
    bare = CellModel(model.config, model.vocab, model.encoder)
    calls = {"blocks": lambda: bare.blocks, "inputs": lambda: bare.inputs(batch), "forward": lambda: bare(batch),
             "gene_table": bare.gene_table}  # fmt: skip
    for name, call in calls.items():
        with pytest.raises(TypeError, match=naming("CellModel", name)):
            call()


def test_a_vocabulary_cannot_be_made_from_an_anndata():
    adata = AnnData(np.ones((1, 2), np.float32))
    with pytest.raises(TypeError, match=naming("AnnData", "vocab=adata.var_names")):
        models.build("scbert", vocab=adata, size="tiny")


def test_only_families_with_a_published_format_are_offered_for_a_foreign_folder(tmp_path):
    with pytest.raises(ValueError, match="'scgpt'") as raised:
        models.load(tmp_path)
    assert "'gpt2'" not in str(raised.value)
