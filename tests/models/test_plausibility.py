"""Plausibility under a gene language model: likelihoods, relaxed orders, and what each kind does to predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from messages import naming
from models.sentences import built, sentences, train
from sklearn.covariance import LedoitWolf
from transformers import GPT2LMHeadModel

from scllm import models
from scllm.engine.likelihood import gene_nats
from scllm.models import Plausibility, ValueEncoder
from scllm.models.plausibility import GaussianPrior
from scllm.models.soft_ranks import hard_ranks, ranked, soft_ranks

LMS = ["gpt2", "albert", "xlnet"]


def profiles(n=6, n_genes=24, seed=0):
    """Log-normalised values without ties."""
    return torch.from_numpy(np.random.default_rng(seed).gamma(2.0, 1.0, (n, n_genes)).astype(np.float32))


def reads_values(n_genes=24, **config):
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 16, "d_hidden": 32, "dropout": 0.0}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        genes = [f"g{i}" for i in range(n_genes)]
        return models.build("scgpt", vocab=genes, encoder=ValueEncoder(max_len=n_genes + 1), **{**sizes, **config})


def by_value(model, values, k=None):
    """The token sequences of profiles, each made by a plain sort."""
    return sentences(model, [np.argsort(-row, kind="stable")[:k].tolist() for row in values.numpy()])


# --- relaxed orders ---


def test_soft_ranks_become_the_order_as_the_temperature_falls():
    values = profiles()
    assert torch.allclose(soft_ranks(values, 24, 1e-7), hard_ranks(values, 24), atol=1e-5)
    assert (hard_ranks(values, 5).argmax(2) == values.argsort(1, descending=True)[:, :5]).all()
    assert torch.allclose(soft_ranks(values, 24, 1.0).sum(2), torch.ones(6, 24))


def test_soft_ranks_have_the_right_gradients():
    values = profiles(2, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: soft_ranks(v, 4, 0.5), values)


def test_the_order_is_exact_and_its_gradients_are_those_of_the_relaxed_one():
    values, weights = profiles().requires_grad_(), torch.randn(6, 8, 24)
    exact, read = ranked(values, 8, 0.3, n_read=torch.full((6,), 24))
    assert torch.equal(exact, hard_ranks(values.detach(), 8))
    assert read.all()
    (found,) = torch.autograd.grad((exact * weights).sum(), values)
    (expected,) = torch.autograd.grad((soft_ranks(values, 8, 0.3) * weights).sum(), values)
    assert torch.allclose(found, expected)


def test_the_highest_values_are_read_and_ties_are_in_the_order_of_columns():
    values = torch.tensor([[0.0, 2.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    order, read = ranked(values, 3, 1.0, n_read=torch.tensor([2, 4]))
    assert order.argmax(2).tolist() == [[1, 3, 0], [0, 1, 2]]
    assert read.tolist() == [[True, True, False], [True, True, True]]


# --- likelihoods ---


@torch.no_grad()
def test_gpt2_nats_are_those_of_transformers():
    lm = built("gpt2").eval()
    values = profiles()
    network = GPT2LMHeadModel(lm.network.config).eval()
    for ours, theirs in zip(lm.network.state_dict().items(), network.state_dict().items(), strict=True):
        theirs[1].copy_(
            ours[1].T if ours[1].shape != theirs[1].shape or ("c_" in ours[0] and ours[1].ndim == 2) else ours[1]
        )
    found = Plausibility(lm, kind="nll")(values)
    for row, nats in zip(by_value(lm, values).genes.view(6, 25), found, strict=True):
        loss = network(input_ids=row[None], labels=row[None]).loss
        # transformers takes the mean over the 24 genes after <cls>
        assert nats.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", LMS)
@torch.no_grad()
def test_nats_are_those_of_perplexity(family):
    lm = built(family).eval()
    values = profiles()
    batch = by_value(lm, values)
    term = Plausibility(lm, kind="nll")
    if family == "albert":
        term.n_folds = 24  # one gene at a time
    found = term(values)
    if family == "xlnet":
        # the orders are others, so only the same order can be compared: from left to right
        place = torch.arange(len(batch.genes)) - batch.first[batch.cell]
        at = place.nonzero().squeeze(1)
        logits = lm.permuted_logits(batch, place, at)
        expected = torch.nn.functional.cross_entropy(logits, batch.genes[at], reduction="none").view(6, 24).mean(1)
        found = term._nats(values, torch.full((6,), 24), torch.arange(24).float())
    else:
        expected = gene_nats(lm, batch)[1].view(6, 24).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", LMS)
def test_no_family_scores_random_orders_below_the_bound(family):
    """The leak test: ln(n!) / n nats per gene, which no model of random permutations can go below."""
    lm = built(family, n_genes=12)
    rng = np.random.default_rng(0)
    train(lm, lambda step: sentences(lm, [rng.permutation(12) for _ in range(32)]), steps=60)
    values = torch.from_numpy(np.stack([rng.permutation(12) for _ in range(64)]).astype(np.float32)) + 1
    bound = np.log(np.arange(1, 13)).sum() / 12
    nats = Plausibility(lm.eval(), kind="nll")(values).mean().item()
    # with four parts, albert knows three quarters of the genes and so which are missing
    hidden = 12 / Plausibility.n_folds
    least = bound if family != "albert" else np.log(np.arange(1, hidden + 1)).sum() / hidden
    assert nats > least - 0.05


@torch.no_grad()
def test_only_expressed_genes_count():
    lm = built("gpt2").eval()
    values = profiles()
    values[:, 10:] = 0
    shorter = sentences(lm, [np.argsort(-row[:10]).tolist() for row in values.numpy()])
    expected = gene_nats(lm, shorter)[1].view(6, 10).mean(1)
    torch.testing.assert_close(Plausibility(lm, kind="nll")(values), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_medians_change_the_order_as_in_the_encoder():
    medians = np.r_[np.linspace(0.2, 3.0, 24), [np.nan] * 2]
    encoder = models.RankEncoder(max_len=32, cls=True, medians=medians)
    lm = built("gpt2", encoder=encoder).eval()
    values = profiles()
    order = np.argsort(-np.expm1(values.numpy()) / medians[:24], kind="stable")
    expected = gene_nats(lm, sentences(lm, order.tolist()))[1].view(6, 24).mean(1)
    torch.testing.assert_close(Plausibility(lm, kind="nll")(values), expected, rtol=1e-4, atol=1e-5)


# --- prediction and truth: as many genes of both ---


def sparse_and_dense():
    """Spots that express 10, 4, 1 and none of 24 genes, and predictions of which no value is 0."""
    truth = profiles(4)
    for row, n_expressed in zip(truth, (10, 4, 1, 0), strict=True):
        row[torch.randperm(24, generator=torch.Generator().manual_seed(n_expressed))[n_expressed:]] = 0
    # a part of the predictions is negative: spots may express more genes than are predicted above 0
    return truth, profiles(4, seed=1) - 2


@pytest.mark.parametrize("family", LMS)
@pytest.mark.parametrize("top_k", [256, 5])
def test_as_many_genes_of_the_prediction_are_read_as_the_truth_expresses(family, top_k):
    lm = built(family).eval()
    truth, predicted = sparse_and_dense()
    both = [torch.full_like(truth, -1), torch.full_like(truth, -1)]
    for part, values in zip(both, (truth, predicted), strict=True):
        for row, n_expressed in enumerate((10, 4, 1, 0)):
            highest = np.argsort(-values[row].numpy(), kind="stable")[: min(n_expressed, top_k)]
            # the same genes in the same order, and no others
            part[row, highest.copy()] = torch.arange(len(highest), 0, -1).float()
    for kind in ("nll", "match", "feature"):
        term = Plausibility(lm, kind=kind, top_k=top_k).eval()
        found = term(predicted, truth)
        torch.testing.assert_close(found, term(both[1], both[0]), rtol=1e-5, atol=1e-6)
        assert found[3] == 0
        if kind == "nll":
            # sequences of these genes alone, without a truth to compare with
            torch.testing.assert_close(found, term(both[1]), rtol=1e-5, atol=1e-6)
        else:
            assert (found[:3] > 0).all()
    predicted.requires_grad_()
    term(predicted, truth).sum().backward()
    assert predicted.grad[:3].norm(dim=1).gt(0).all()
    assert predicted.grad.isfinite().all()


def test_match_moves_predictions_that_are_too_typical_away_from_nll():
    """Ten of 24 genes are expressed, in an order that varies; the mean profile is more typical than any spot."""
    rng = np.random.default_rng(0)

    def spots(n):
        values = np.linspace(3, 0.5, 24) + 0.4 * rng.normal(size=(n, 24))
        least = np.sort(values, axis=1)[:, [14]]
        return np.where(values >= least, values, 0).astype(np.float32)

    lm = built("gpt2")
    train(lm, lambda step: by_value(lm, torch.from_numpy(spots(32)), 10), steps=150)
    truth = torch.from_numpy(spots(64))
    predicted = truth.mean(0).repeat(64, 1).requires_grad_()
    assert (predicted > 0).sum(1).min() > 15
    found = {}
    for kind in ("nll", "match"):
        loss = Plausibility(lm.eval(), kind=kind, tau=0.3)(predicted, truth)
        found[kind] = torch.autograd.grad(loss.sum(), predicted)[0]
    with torch.no_grad():
        nll = Plausibility(lm, kind="nll")
        is_typical = nll(predicted, truth) < nll(truth)
    assert is_typical.float().mean() > 0.9
    torch.testing.assert_close(found["match"][is_typical], -found["nll"][is_typical])
    torch.testing.assert_close(found["match"][~is_typical], found["nll"][~is_typical])


@torch.no_grad()
def test_medians_order_negative_predictions_below_the_others():
    medians = np.r_[np.linspace(0.2, 3.0, 24), [np.nan] * 2]
    lm = built("gpt2", encoder=models.RankEncoder(max_len=32, cls=True, medians=medians)).eval()
    values = profiles() - 1.5
    key = np.where(values > 0, np.expm1(values.numpy()) / medians[:24], values.numpy())
    expected = gene_nats(lm, sentences(lm, np.argsort(-key, kind="stable").tolist()))[1].view(6, 24).mean(1)
    found = Plausibility(lm, kind="nll")(values, torch.ones(6, 24))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- the values form ---


@torch.no_grad()
def test_values_enter_scgpt_as_they_are():
    lm = reads_values().eval()
    values = profiles(3)
    term = Plausibility(lm, kind="masked", mask_ratio=0.25)
    draws = torch.Generator().manual_seed(0)
    torch.randperm(24, generator=draws)
    hidden = torch.randperm(24, generator=draws)[:6]
    batch = term._value_batch(torch.arange(24), values)
    assert batch.genes.view(3, 25)[:, 0].tolist() == [lm.vocab.cls_id] * 3
    assert torch.equal(batch.values.view(3, 25)[:, 1:], values)
    at = (torch.arange(3)[:, None] * 25 + 1 + hidden).flatten()
    predicted = lm.reconstruct(batch, at, hide=True).view(3, 6)
    torch.testing.assert_close(term(values), ((predicted - values[:, hidden]) ** 2).mean(1))


# --- kinds ---


def terms():
    for family in LMS:
        yield from ((built(family), kind) for kind in ("feature", "match", "nll"))
    yield from ((reads_values(), kind) for kind in ("feature", "match", "nll", "masked"))


def test_every_kind_is_zero_or_positive_and_has_gradients():
    for lm, kind in terms():
        truth = profiles()
        predicted = (truth + 0.3 * torch.randn(6, 24)).requires_grad_()
        loss = Plausibility(lm, kind=kind)(predicted, truth)
        assert loss.shape == (6,)
        assert (loss >= 0).all()
        loss.sum().backward()
        assert predicted.grad.norm() > 0, (lm.family, kind)
        if kind in ("feature", "match"):
            assert torch.equal(Plausibility(lm, kind=kind)(truth, truth), torch.zeros(6))


def test_the_language_model_is_frozen_and_the_given_one_unchanged():
    lm = built("gpt2").train()
    term = Plausibility(lm).train()
    assert not term.lm.training
    assert not any(weight.requires_grad for weight in term.parameters())
    assert lm.training
    assert all(weight.requires_grad for weight in lm.parameters())


def test_calls_repeat_in_evaluation_and_draw_anew_in_training():
    term = Plausibility(reads_values(), kind="masked").eval()
    values = profiles()
    assert torch.equal(term(values), term(values))
    term.train()
    assert not torch.equal(term(values), term(values))


def test_columns_are_found_by_name():
    lm = built("gpt2").eval()
    values, order = profiles(), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    term = Plausibility(lm, kind="nll", genes=[f"g{i}" for i in order.tolist()] + ["unknown"])
    found = term(torch.cat([values[:, order], 9 * torch.ones(6, 1)], dim=1))
    torch.testing.assert_close(found, Plausibility(lm, kind="nll")(values))


def test_gaussian_prior_is_that_of_scikit_learn():
    data = np.random.default_rng(0).normal(size=(40, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    fitted = LedoitWolf().fit(data)
    found = GaussianPrior(data)(torch.from_numpy(data.astype(np.float32)))
    np.testing.assert_allclose(found, fitted.mahalanobis(data) / 10, rtol=1e-3)


def test_input_that_does_not_fit_is_named():
    lm = built("gpt2")
    with pytest.raises(ValueError, match=naming("'features'", "'feature'")):
        Plausibility(lm, kind="features")
    with pytest.raises(ValueError, match=naming("'masked'", "gpt2", "'nll'")):
        Plausibility(lm, kind="masked")
    with pytest.raises(ValueError, match=naming("truth=", "'match'")):
        Plausibility(lm, kind="match")(profiles())
    with pytest.raises(ValueError, match=naming("(6, 23)", 24)):
        Plausibility(lm, kind="nll")(profiles()[:, 1:])
    with pytest.raises(ValueError, match=naming(0, 2, "'CD3D'")):
        Plausibility(lm, genes=["CD3D", "LYZ"])
    with pytest.raises(ValueError, match=naming("at least 2", "got 1 of 1")):
        Plausibility(lm, genes=["g1"])
    with pytest.raises(ValueError, match=naming("BinEncoder", "ValueEncoder")):
        Plausibility(models.build("scgpt", vocab=["a", "b"], size="tiny"))
    with pytest.raises(ValueError, match=naming("include_zeros=False", "include_zeros=True")):
        Plausibility(models.build("scgpt", vocab=["a", "b"], encoder=ValueEncoder(include_zeros=False), size="tiny"))
    with pytest.raises(ValueError, match=naming("geneformer", "'scgpt'")):
        Plausibility(models.build("geneformer", vocab=["a", "b"], size="tiny"))
    with pytest.raises(ValueError, match=naming("tau=0")):
        Plausibility(lm, tau=0)
