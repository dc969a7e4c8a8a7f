"""Perplexity of cells, compared with scoring one gene at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData
from messages import naming
from scipy import sparse

from scllm import datasets, models
from scllm.data.genes import match
from scllm.data.tokens import Tokens
from scllm.engine import likelihood
from scllm.metrics import permutation_bound, unigram_nats
from scllm.models.base import Batch
from scllm.tl import _perplexity, perplexity, pretrain

FAMILIES = ("gpt2", "albert", "xlnet")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def few(adata):
    """12 cells with different numbers of genes, one of them empty."""
    few = adata[:12].copy()
    few.X = sparse.diags_array(np.arange(12) != 3, dtype=np.float32).tocsr() @ few.X
    few.X.eliminate_zeros()
    few.X.sort_indices()
    return few


def built(family):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        names = [f"gene_{i}" for i in range(40)]
        model = models.build(family, vocab=names, n_layers=2, n_heads=2, d_model=16, max_len=41).eval()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)  # far from uniform
    return model


def sentence(adata, model, cell) -> Batch:
    genes = match(adata.var_names, model.vocab)
    return Batch.from_tokens(model.encoder(genes.tokens(adata.X[[cell]]), model.vocab, measured=genes.measured))


@torch.no_grad()
def nats_slowly(model, batch) -> float:
    """Score one gene at a time."""
    genes, n = batch.genes, len(batch.genes)
    found = []
    for place in range(1, n):
        if model.likelihood == "causal":
            before = Batch.from_tokens(Tokens(np.array([0, place]), genes[:place].numpy(), None))
            logits = model.network.lm_head(model.hidden(before)[-1])
        elif model.likelihood == "pseudo":
            hidden = genes.clone()
            hidden[place] = model.vocab.mask_id
            whole = Batch.from_tokens(Tokens(np.array([0, n]), hidden.numpy(), None))
            logits = model.network.predictions(model.hidden(whole)[place])
        else:
            logits = torch.stack([_in_order(model, batch, number, place) for number in range(likelihood.N_ORDERS)])
        found.append(-logits.log_softmax(-1)[..., genes[place]].mean().item())
    return float(np.mean(found))


def _in_order(model, batch, number, place):
    draws = np.random.default_rng(number).random(len(batch.genes))
    order = torch.tensor([0, *(np.argsort(np.argsort(draws[1:])) + 1)])
    return model.permuted_logits(batch, order, torch.tensor([place]))[0]


@every_family
@pytest.mark.filterwarnings("ignore:1 of 12 cells")
def test_nats_are_those_of_one_gene_at_a_time(few, family):
    model = built(family)
    perplexity(few, model)
    expected = [np.nan if cell == 3 else nats_slowly(model, sentence(few, model, cell)) for cell in range(12)]
    np.testing.assert_allclose(few.obs["perplexity_nats"], expected, atol=1e-4)
    np.testing.assert_allclose(few.obs["perplexity"], np.exp(few.obs["perplexity_nats"]))
    n_genes = np.diff(few.X.indptr)
    total = np.nansum(few.obs["perplexity_nats"] * n_genes) / n_genes.sum()
    assert few.uns["scllm"]["perplexity"]["nats"] == pytest.approx(total, rel=1e-6)


@every_family
def test_order_batch_size_and_pass_size_do_not_matter(adata, family, monkeypatch):
    model, cells = built(family), adata[:20].copy()
    perplexity(cells, model)
    other = cells[::-1].copy()
    monkeypatch.setitem(likelihood._TOKENS, "cpu", 100)
    perplexity(other, model, batch_size=3)
    np.testing.assert_allclose(other.obs["perplexity_nats"][::-1], cells.obs["perplexity_nats"], atol=1e-5)


def test_the_kind_is_recorded_with_bound_and_baselines(adata):
    kinds = {}
    for family in FAMILIES:
        cells = adata[:10].copy()
        assert perplexity(cells, built(family), key_added="p", copy=False) is None
        written = cells.uns["scllm"]["perplexity"]
        kinds[family] = written["params"]["kind"]
        assert {"p", "p_nats"} <= set(cells.obs)
        n = np.diff(cells.X.indptr)
        bound = sum(np.log(np.arange(1, k + 1)).sum() for k in n) / n.sum()
        assert written["bound"] == pytest.approx(bound)
        # special tokens never occur
        assert written["unigram"] < np.log(42) + 0.1
        assert written["unigram_by_position"] > 0
    assert kinds == {"gpt2": "causal", "albert": "pseudo", "xlnet": "permutation"}


@pytest.mark.parametrize("new", [1, 100, 2**20])
def test_baselines_are_those_of_genes_counted_one_by_one(adata, monkeypatch, new):
    monkeypatch.setattr(_perplexity, "_NEW", new)
    model = built("gpt2")
    perplexity(adata, model, batch_size=2)
    counts = np.zeros((model.encoder.max_len, len(model.vocab)), np.uint32)
    for cell in range(adata.n_obs):
        genes = sentence(adata, model, cell).genes.numpy()
        for place in range(1, len(genes)):
            counts[place, genes[place]] += 1
    written = adata.uns["scllm"]["perplexity"]
    assert (written["unigram"], written["unigram_by_position"]) == unigram_nats(sparse.csr_array(counts.astype(float)))


def test_counts_are_rarely_merged(monkeypatch):
    monkeypatch.setattr(_perplexity, "_NEW", 100)
    rng, expected, sizes = np.random.default_rng(0), np.zeros((50, 400)), set()
    places = _perplexity._Places((50, 400))
    for _ in range(500):
        place, gene = rng.integers(0, 50, 20), rng.integers(0, 400, 20)
        np.add.at(expected, (place, gene), 1)
        places.add(place, gene)
        sizes.add(places._counts.nnz)
    # 0, 100, 200, 400, ...
    assert len(sizes) < 10
    np.testing.assert_array_equal(places.counts().toarray(), expected)


def test_results_can_be_written(adata, tmp_path):
    copied = perplexity(adata, built("gpt2"), copy=True)
    assert "perplexity" not in adata.obs
    copied.write_h5ad(tmp_path / "cells.h5ad")
    assert "perplexity" in copied.uns["scllm"]


def test_models_without_a_likelihood_are_refused(adata, tiny):
    with pytest.raises(ValueError, match=naming("scgpt", "gpt2")):
        perplexity(adata, tiny)


def test_counts_are_needed(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X.data = np.log1p(adata.X.data)
    with pytest.raises(ValueError, match="Layer 'counts' holds counts"):
        perplexity(adata, built("gpt2"))
    perplexity(adata, built("gpt2"), layer="counts")
    assert adata.obs["perplexity"].notna().all()


def test_permutation_bound_is_that_of_the_best_model_of_random_orders():
    # guessing among the n remaining genes costs ln n, then ln (n - 1), ..., 0
    assert permutation_bound([40]) == pytest.approx(np.log(np.arange(1, 41)).mean())
    assert permutation_bound([40]) == pytest.approx(2.758, abs=1e-3)
    assert permutation_bound([2, 4]) == pytest.approx((np.log(2) + np.log(24)) / 6)
    assert np.isnan(permutation_bound([0]))


def test_unigrams_hold_out_each_gene():
    # three positions; gene 0 is always first, the other genes come in any order
    counts = sparse.csr_array(np.array([[8, 0, 0], [0, 5, 3], [0, 3, 5]]))
    anywhere, by_place = unigram_nats(counts)
    share = np.array([8, 8, 8]) / (24 - 1 + 3)
    assert anywhere == pytest.approx(-np.log(share[0]))
    n, of = np.array([8, 5, 3, 3, 5]), np.array([8, 8, 8, 8, 8])
    slowly = [-(n * np.log((n - 1 + w * share[0]) / (of - 1 + w))).sum() / 24 for w in (1, 10, 100, 1e3, 1e4)]
    assert by_place == pytest.approx(min(slowly))
    assert by_place < anywhere


def test_unigrams_do_not_profit_from_what_they_score():
    rng = np.random.default_rng(0)
    genes = np.array([rng.permutation(60)[:30] for _ in range(50)])
    counts = sparse.coo_array((np.ones(genes.size), (np.tile(np.arange(30), 50), genes.ravel())), (30, 60)).tocsr()
    for found in unigram_nats(counts):
        assert found > np.log(60) - 0.01  # the position tells nothing about uniformly distributed genes


def test_shuffled_cells_are_less_plausible_to_a_trained_model():
    cells = datasets.toy(n_cells=120, n_genes=30)
    model = pretrain(cells, "gpt2", size="tiny", epochs=8, lr=2e-3, device="cpu")
    rng = np.random.default_rng(0)
    counts = cells.X.toarray()
    mixed = AnnData(sparse.csr_matrix(np.array([rng.permutation(row) for row in counts])), var=cells.var)
    for some in (cells, mixed):
        perplexity(some, model)
    assert cells.obs["perplexity_nats"].mean() < mixed.obs["perplexity_nats"].mean() - 0.3
    assert cells.uns["scllm"]["perplexity"]["nats"] < cells.uns["scllm"]["perplexity"]["unigram_by_position"]
