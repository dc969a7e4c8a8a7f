"""Masked gene prediction: choice of genes and loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from messages import naming
from torch.nn import functional as F

from scllm import models
from scllm.data.tokens import Tokens
from scllm.engine.objectives import MaskedGene, objective_from_dict, objective_to_dict
from scllm.models.base import Batch
from scllm.models.layers import linear_cross_entropy


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return models.build("geneformer", vocab=[f"g{i}" for i in range(400)], size="tiny", max_len=128).eval()


def cells(n_cells, n_genes=100, first=0):
    rng = np.random.default_rng(0)
    rows = [np.concatenate([[2], rng.permutation(400)[:n_genes] + 4, [3]]) for _ in range(n_cells)]
    ends = np.arange(n_cells + 1) * (n_genes + 2)
    return Batch.from_tokens(Tokens(ends, np.concatenate(rows).astype(np.int32), None), np.arange(n_cells) + first)


def test_shares_are_those_of_bert_and_specials_are_never_chosen(model):
    batch = cells(400)
    shown, at = MaskedGene(p=0.15).hide(batch, model.is_special, model.vocab.mask_id)
    before, after = batch.genes[at], shown.genes[at]
    assert not model.is_special[before].any()
    assert (shown.genes == batch.genes).sum() >= len(batch.genes) - len(at)
    n = len(at)
    shares = [(after == model.vocab.mask_id).sum(), ((after != before) & (after != model.vocab.mask_id)).sum()]
    # tolerances are five standard errors of 40,000 and of 6,000 draws
    assert n / 40_000 == pytest.approx(0.15, abs=5 * np.sqrt(0.15 * 0.85 / 40_000))
    for found, share in zip(shares, (0.8, 0.1), strict=True):
        assert found / n == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / n))
    others = after[(after != before) & (after != model.vocab.mask_id)]
    assert not model.is_special[others].any()
    assert len(others.unique()) > 200


def test_draws_depend_on_the_key_of_the_cell(model):
    objective, batch = MaskedGene(), cells(4)
    together, _ = objective.hide(batch, model.is_special, 1)
    for cell in range(4):
        part = slice(cell * 102, (cell + 1) * 102)
        alone = Batch.from_tokens(Tokens(np.array([0, 102]), batch.genes[part].numpy(), None), np.array([cell]))
        assert torch.equal(objective.hide(alone, model.is_special, 1)[0].genes, together.genes[part])
    other, _ = objective.hide(cells(4, first=9), model.is_special, 1)
    assert not torch.equal(other.genes, together.genes)


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_the_masked_genes_in_nats(model):
    batch, objective = cells(5), MaskedGene()
    shown, at = objective.hide(batch, model.is_special, model.vocab.mask_id)
    expected = F.cross_entropy(model.gene_logits(shown, at), batch.genes[at], reduction="sum")
    loss = objective(model, batch, 0)
    assert loss.count == len(at)
    torch.testing.assert_close(loss.sum, expected)


def test_a_batch_without_masked_genes_has_a_loss_of_zero(model):
    tokens = Tokens(np.array([0, 2, 4]), np.array([2, 3, 2, 3]), None)
    loss = MaskedGene()(model, Batch.from_tokens(tokens, np.arange(2)), 0)
    assert (loss.sum.item(), loss.count.item()) == (0, 0)
    loss.sum.backward()


@pytest.mark.parametrize("n", [3, 5000])
def test_cross_entropy_and_gradients_equal_those_of_torch_for_any_number_of_rows(n):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*shape, generator=generator) for shape in ((n, 16), (900, 16), (900,))]
    target = torch.randint(0, 900, (n,), generator=generator)
    ours, theirs = ([x.clone().requires_grad_() for x in made] for _ in range(2))
    total = linear_cross_entropy(*ours, target)
    expected = F.cross_entropy(F.linear(*theirs), target, reduction="sum")
    torch.testing.assert_close(total, expected)
    total.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_settings_survive_saving_and_a_model_that_predicts_values_is_an_error():
    assert objective_from_dict(objective_to_dict(MaskedGene(0.3, 7))) == MaskedGene(0.3, 7)
    scgpt = models.build("scgpt", vocab=["a", "b"], size="tiny")
    with pytest.raises(ValueError, match=naming("MaskedGene", "'pseudo'", "'scgpt'")):
        MaskedGene()(scgpt, cells(1), 0)
