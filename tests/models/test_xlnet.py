"""XLNet: what each gene is predicted from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from messages import naming
from models.sentences import built, sentences, shuffled
from transformers import XLNetConfig, XLNetLMHeadModel

from scllm import models
from scllm.engine.objectives import PermutedGene, objective_from_dict
from scllm.engine.objectives.permuted_gene import turns


def in_order(batch):
    """Turns from left to right, `<cls>` at 0."""
    return torch.arange(len(batch.genes)) - batch.first[batch.cell]


@torch.no_grad()
def test_identity_order_is_the_unidirectional_likelihood():
    """One gene after the other, each asked of transformers' XLNet that holds the genes before it and no others."""
    model = built("xlnet").eval()
    config = XLNetConfig(vocab_size=len(model.vocab), d_model=32, n_layer=2, n_head=2, d_inner=128, dropout=0.0)
    network = XLNetLMHeadModel(config).eval()
    weights = {name.removeprefix("network."): weight for name, weight in model.state_dict().items()}
    network.load_state_dict(weights, strict=False)
    batch = shuffled(model, 1, 8, seed=0)
    at = torch.arange(1, 9)
    ours = model.permuted_logits(batch, in_order(batch), at).log_softmax(1)
    for n in range(1, 9):
        # the sentence ends with the gene that is asked for, which nothing sees; what follows is not there at all
        part = batch.genes[None, : n + 1]
        unseen = torch.triu(torch.ones(n + 1, n + 1))[None]
        target = torch.zeros(1, 1, n + 1)
        target[0, 0, n] = 1
        logits = network(input_ids=part, perm_mask=unseen, target_mapping=target).logits
        torch.testing.assert_close(ours[n - 1], logits[0, 0].log_softmax(0), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_gene_is_predicted_from_those_before_it_in_the_order_alone():
    model = built("xlnet").eval()
    batch = shuffled(model, 1, 6, seed=0)
    order = torch.tensor([0, 3, 1, 6, 2, 5, 4])
    at = torch.arange(1, 7)
    logits = model.permuted_logits(batch, order, at)
    for changed in range(1, 7):
        genes = batch.genes.clone()
        genes[changed] = 23 if genes[changed] != 23 else 22
        other = model.permuted_logits(replace(batch, genes=genes), order, at)
        moved = ((other - logits).abs().amax(1) > 1e-5).tolist()
        assert moved == [bool(order[place] > order[changed]) for place in range(1, 7)]


@torch.no_grad()
def test_logits_come_in_the_order_asked_for_and_cells_do_not_mix():
    model = built("xlnet").eval()
    rng = np.random.default_rng(0)
    batch = sentences(model, [rng.permutation(24)[:n] for n in (5, 0, 9)])
    order = in_order(batch)
    at = torch.tensor([12, 3, 8, 1])
    found = model.permuted_logits(batch, order, at)
    every = model.permuted_logits(batch, order, torch.arange(len(batch.genes)))
    torch.testing.assert_close(found, every[at], atol=1e-5, rtol=0)
    one = sentences(model, [batch.genes[8:].numpy()])
    torch.testing.assert_close(
        model.permuted_logits(one, in_order(one), torch.tensor([1]))[0], found[2], atol=1e-5, rtol=0
    )


def test_turns_are_a_permutation_of_each_cell():
    model = built("xlnet")
    batch = sentences(model, [[3, 1, 2], [], [5, 4]])
    special = model.is_special[batch.genes]
    draws = torch.tensor([0.5, 0.9, 0.1, 0.4, 0.0, 0.7, 0.8, 0.2], dtype=torch.float64)
    assert turns(batch, special, draws).tolist() == [0, 3, 1, 2, 0, 0, 2, 1]


def test_a_share_of_the_last_genes_is_predicted():
    model = built("xlnet")
    batch = shuffled(model, 10, 12, seed=0)
    assert int(PermutedGene()(model, batch, 0).count) == 120
    assert int(PermutedGene(share=0.25)(model, batch, 0).count) == 30
    with pytest.raises(ValueError, match=naming("share", "got 0", "1")):
        PermutedGene(share=0)


@torch.no_grad()
def test_orders_are_keyed_by_cell_and_seed():
    model = built("xlnet").eval()
    batch = shuffled(model, 4, 12, seed=0)
    other = replace(batch, keys=batch.keys + 100)
    first, again = (float(PermutedGene()(model, batch, 0).sum) for _ in range(2))
    assert first == again
    assert first != float(PermutedGene()(model, other, 0).sum)
    assert first != float(objective_from_dict({"kind": "PermutedGene", "seed": 1})(model, batch, 0).sum)


def test_published_size():
    published = XLNetConfig(vocab_size=32_000, d_model=768, n_layer=12, n_head=12, d_inner=3072)
    with torch.device("meta"):
        theirs = XLNetLMHeadModel(published).num_parameters()
    model = models.build("xlnet", vocab=[f"g{i}" for i in range(100)], size="xlnet-base")
    # a row and an output bias for each token
    assert model.n_parameters == theirs - (32_000 - 102) * 769
    assert model.n_parameters + (25_426 - 102) * 769 == 111_694_930
