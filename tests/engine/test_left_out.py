"""Genes held out of the input, and predicted from the cell embedding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from messages import naming

from scllm import datasets, models
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.engine.objectives import MaskedValue
from scllm.engine.objectives.masked_value import OUT


@pytest.fixture(scope="module")
def model():
    torch.default_generator.manual_seed(0)
    return models.build("scgpt", vocab=list(datasets.toy(n_cells=24).var_names), size="tiny", dropout=0.0).eval()


@pytest.fixture(scope="module")
def batch(model):
    adata = datasets.toy(n_cells=24)
    match = genes.match(adata.var_names, model.vocab)
    cells = Loader(open_source(adata), np.arange(24), match, model.encoder, model.vocab, 24)
    [[found]] = cells.epoch(0)
    return found


def test_held_out_and_random_genes_have_the_values_of_their_cell(model, batch):
    objective = MaskedValue(left_out=0.3)
    out = objective.hide(batch, model.is_special, 0.3, OUT)
    gene, cell, value = objective._left_out(batch, out, len(model.vocab))
    dense = torch.zeros(batch.n_cells, len(model.vocab))
    dense[batch.cell, batch.genes] = batch.values
    assert len(gene) == 2 * len(out)
    assert torch.equal(dense[cell, gene], value)
    assert (value[len(out) :] == 0).any()


def test_the_blocks_do_not_see_held_out_genes(model, batch, monkeypatch):
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda shown: seen.append(shown) or hidden(shown))
    MaskedValue(left_out=0.3)(model, batch, 0)
    lengths = np.array(batch.lengths) - 1
    assert list(np.array(seen[0].lengths) - 1) == list(lengths - np.floor(lengths * 0.3).astype(int))
    assert torch.equal(seen[0].genes[seen[0].first], batch.genes[batch.first])


def test_without_held_out_genes_the_loss_is_that_of_scgpt(model, batch):
    plain, none = MaskedValue()(model, batch, 3), MaskedValue(left_out=0.0)(model, batch, 3)
    assert torch.equal(plain.sum, none.sum)


def test_holding_out_all_genes_is_an_error():
    with pytest.raises(ValueError, match=naming("left_out", "1.0", "0")):
        MaskedValue(left_out=1.0)
