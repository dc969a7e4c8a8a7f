"""Labels and weights of gene tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from messages import naming

from scllm import models
from scllm.data.tokens import Tokens
from scllm.engine import losses
from scllm.engine.objectives import GeneLabel, objective_from_dict, objective_to_dict
from scllm.models.base import Batch, HeadSpec

GENES = np.array([9, 0, 1, 5, 9, 9, 2, 1, 4, 0])  # 9 is <cls>
VALUES = np.array([0, 3, 5, 1, 0, 0, 2, 0, 4, 7], np.float32)


@pytest.fixture
def batch() -> Batch:
    return Batch.from_tokens(Tokens(np.array([0, 4, 5, 10]), GENES, VALUES))


@pytest.fixture
def model():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build("scgpt", vocab=[f"g{i}" for i in range(9)], n_layers=1, n_heads=2, d_model=8, d_hidden=8)
        model.set_heads((HeadSpec("kind", ("a", "b"), level="gene"),))
    return model.eval()


def expected(model, batch, rows, label, weight, loss) -> float:
    logits = model.gene_head_outputs(batch)["kind"][rows]
    each = losses.binary_cross_entropy if loss == "bce" else losses.focal
    return float((each(logits, torch.tensor(label)) * torch.tensor(weight)).sum())


@torch.no_grad()
@pytest.mark.parametrize("loss", ["bce", "focal"])
def test_the_loss_is_weighted_over_expressed_tokens_of_labelled_genes(model, batch, loss):
    objective = GeneLabel(genes=[[0, 7], [1]], weights=[[2.0, 1.0], [3.0]], loss={loss: 1.0})
    found = objective(model.train(False), batch, 0)
    assert float(found.count) == 0  # no gene is held out
    model.training = True  # as in training with a frozen encoder
    found = objective(model, batch, 0)
    # gene 0 occurs twice, gene 1 once: its other token is a zero
    assert float(found.count) == 2 + 2 + 3
    assert float(found.sum) == pytest.approx(
        expected(model, batch, [1, 9, 2], [0, 0, 1], [2.0, 2.0, 3.0], loss), rel=1e-5
    )


@torch.no_grad()
def test_held_out_genes_are_labelled_only_in_evaluation(model, batch):
    objective = GeneLabel(
        genes=[[0], [1]], weights=[[1.0], [1.0]], held_out=[[2], [4]], held_out_weights=[[1.0], [5.0]]
    )
    found = objective(model.eval(), batch, 0)
    assert float(found.count) == 6
    assert float(found.sum) == pytest.approx(expected(model, batch, [6, 8], [0, 1], [1.0, 5.0], "bce"), rel=1e-5)


def test_a_batch_without_labelled_genes_has_a_loss_of_zero_and_a_gradient(model, batch):
    found = GeneLabel(genes=[[7], [8]], weights=[[1.0], [1.0]])(model.train(), batch, 0)
    assert (float(found.sum.detach()), float(found.count)) == (0, 0)
    found.sum.backward()
    assert float(model.heads[0].weight.grad.abs().sum()) == 0


def test_settings_come_back_from_json():
    objective = GeneLabel(genes=((0, 7), (1,)), weights=((2.0, 1.0), (3.0,)), loss={"dice": 0.5, "ce": 1.0})
    again = objective_from_dict(json.loads(json.dumps(objective_to_dict(objective))))
    assert objective_to_dict(again)["loss"] == {"dice": 0.5, "ce": 1.0}
    assert [list(ids) for ids in again.genes] == [[0, 7], [1]]


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match=naming("loss", {"mse": 1.0}, "loss='ce'")):
        GeneLabel(genes=[[0], [1]], weights=[[1.0], [1.0]], loss={"mse": 1.0})
