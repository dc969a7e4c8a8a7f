"""What the gene language models share: packed cells, storage, hidden genes, and that none of them copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from messages import naming
from models.sentences import built, nats, own_objective, sentences, shuffled, train

from scllm import models
from scllm.data.encode import BinEncoder, RankEncoder
from scllm.data.tokens import Tokens
from scllm.engine.objectives import Loss, MaskedGene, NextGene, PermutedGene
from scllm.metrics import permutation_bound
from scllm.models.base import Batch, HeadSpec

FAMILIES = ("gpt2", "albert", "xlnet")
every_family = pytest.mark.parametrize("family", FAMILIES)

LENGTHS = (4, 0, 12, 7)


@pytest.fixture
def mixed():
    """Cells of different lengths, one without genes."""

    def make(model):
        rng = np.random.default_rng(1)
        return sentences(model, [rng.permutation(24)[:n] for n in LENGTHS])

    return make


def alone(batch, cell):
    rows = slice(int(batch.cu_seqlens[cell]), int(batch.cu_seqlens[cell + 1]))
    genes = batch.genes[rows].numpy()
    return Batch.from_tokens(Tokens(np.array([0, len(genes)]), genes, None), keys=batch.keys[[cell]].numpy()), rows


@every_family
@torch.no_grad()
def test_cells_of_a_batch_do_not_see_each_other(family, mixed):
    model = built(family).eval()
    batch = mixed(model)
    for layer in (-1, -2, -3):
        together = model.hidden(batch, layer=layer)
        assert together.shape == (len(batch.genes), 32)
        for cell in range(batch.n_cells):
            one, rows = alone(batch, cell)
            torch.testing.assert_close(model.hidden(one, layer=layer), together[rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.hidden(batch, layer=layer, first_only=True), together[batch.first])


@every_family
@torch.no_grad()
def test_embeddings_do_not_depend_on_order_or_batch_size(family, mixed):
    model = built(family).eval()
    batch = mixed(model)
    together = model.embed(batch)
    parts = [alone(batch, cell)[0] for cell in (3, 2, 1, 0)]
    torch.testing.assert_close(torch.cat([model.embed(part) for part in parts]).flip(0), together, atol=1e-5, rtol=0)
    assert together[1].abs().sum() == 0  # a cell without genes has no mean


@every_family
@torch.no_grad()
def test_the_layers_are_those_of_transformers(family, mixed):
    model = built(family).eval()
    batch = mixed(model)
    genes, _, padding = batch.padded(pad_id=model.vocab.pad_id)
    found = model.network(input_ids=genes, attention_mask=(~padding).long(), output_hidden_states=True)
    for layer, states in zip((-3, -2, -1), found.hidden_states, strict=True):
        torch.testing.assert_close(model.hidden(batch, layer=layer), states[~padding], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.inputs(batch), found.hidden_states[0][~padding])


@every_family
@torch.no_grad()
def test_native_round_trip_is_equal_to_the_bit(family, mixed, tmp_path):
    model = built(family).eval()
    model.set_heads([HeadSpec("cell_type", ("A", "B"))])
    batch = mixed(model)
    model.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert torch.equal(model(batch).hidden, again(batch).hidden)
    assert torch.equal(model.head_outputs(batch)["cell_type"], again.head_outputs(batch)["cell_type"])
    assert (again.config, again.vocab, again.encoder, again.head_specs, again.hash()) == (
        model.config, model.vocab, model.encoder, model.head_specs, model.hash(),
    )  # fmt: skip


@every_family
def test_tied_weights_stay_tied_after_loading(family, tmp_path):
    model = built(family)
    model.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    network = again.network
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert again.n_parameters == model.n_parameters


@every_family
def test_eight_cells_are_learnt_by_heart(family):
    model = built(family)
    cells = shuffled(model, 8, 12, seed=0)
    losses = train(model, lambda step: cells, steps=150, lr=1e-2)
    # the first gene of eight cells cannot be known: ln(8) / 12 of the causal and permuted losses stay
    assert min(losses[-5:]) < losses[0] / 10


@pytest.mark.parametrize(("family", "n_genes"), [("gpt2", 12), ("albert", 24), ("xlnet", 12)])
def test_leak_no_model_goes_below_the_bound_on_random_orders(family, n_genes):
    # with all genes in every cell a masked model may know the last one left: ALBERT's are drawn from twice as many
    model = built(family, n_genes)
    train(model, lambda step: shuffled(model, 32, 12, step), steps=120, lr=5e-3)
    found = nats(model, shuffled(model, 64, 12, seed=10**6))
    assert found > permutation_bound([12]) - 0.05
    assert found < np.log(n_genes) + 0.3


def test_leak_is_caught_without_a_causal_mask(monkeypatch):
    model = built("gpt2", d_model=64)

    def nothing_hidden(config, inputs_embeds, **_):
        b, l, _ = inputs_embeds.shape
        return torch.zeros(b, 1, l, l)

    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.create_causal_mask", nothing_hidden)
    train(model, lambda step: shuffled(model, 64, 12, step), steps=100, lr=1e-3)
    assert nats(model, shuffled(model, 64, 12, seed=10**6)) < permutation_bound([12]) - 0.05
    with pytest.raises(ValueError, match=naming("'gpt2'", "causal")):
        built("gpt2")


def test_leak_is_caught_without_perm_mask(monkeypatch):
    model = built("xlnet")
    monkeypatch.setattr(model, "_unseen", lambda turn: torch.zeros(*turn.shape, turn.shape[1]))
    train(model, lambda step: shuffled(model, 32, 12, step), steps=70, lr=1e-2)
    assert nats(model, shuffled(model, 64, 12, seed=10**6)) < permutation_bound([12]) - 0.05


def test_leak_is_caught_with_nothing_masked():
    model = built("albert")

    def copied(model, batch, step):
        at = (~model.is_special[batch.genes]).nonzero().squeeze(1)
        nats = torch.nn.functional.cross_entropy(model.gene_logits(batch, at), batch.genes[at], reduction="sum")
        return Loss(nats, torch.tensor(len(at)))

    losses = train(model, lambda step: shuffled(model, 32, 12, step), steps=60, lr=1e-2, objective=copied)
    assert losses[-1] < permutation_bound([12]) - 0.05


@every_family
def test_draws_do_not_depend_on_the_batch(family, mixed):
    model = built(family).eval()
    batch = mixed(model)
    objective = own_objective(model)
    parts = [objective(model, alone(batch, cell)[0], 3) for cell in range(batch.n_cells)]
    whole = objective(model, batch, 3)
    assert sum(int(part.count) for part in parts) == int(whole.count) > 0
    torch.testing.assert_close(sum(part.sum for part in parts), whole.sum, atol=1e-4, rtol=1e-5)


@every_family
def test_reconstruction_is_the_probability_of_the_gene_in_its_place(family, mixed):
    model = built(family).eval()
    batch = mixed(model)
    at = torch.tensor([2, 8])
    with torch.no_grad():
        found = model.reconstruct(batch, at, hide=True)
        other = batch.genes.clone()
        other[8] = (batch.genes[8] + 1) % 24
        changed = model.reconstruct(replace(batch, genes=other), at, hide=True)
    assert ((found > 0) & (found < 1)).all()
    # what stands at a hidden place does not matter for any other
    torch.testing.assert_close(found[0], changed[0])
    with pytest.raises(ValueError, match=naming(family, "genes=")):
        model.reconstruct_genes(batch, torch.tensor([1]))


@pytest.mark.parametrize("objective", [NextGene(), MaskedGene(), PermutedGene()])
@every_family
def test_objectives_refuse_models_they_would_leak_in(family, objective):
    model = built(family)
    if objective == own_objective(model):
        assert objective(model, shuffled(model, 8, 12, 0), 0).count > 0
        return
    with pytest.raises(ValueError, match=naming(type(objective).__name__, repr(model.likelihood), repr(family))):
        objective(model, shuffled(model, 2, 5, 0), 0)


@every_family
def test_only_rank_sentences_behind_cls_are_read(family):
    for encoder in (BinEncoder(max_len=32), RankEncoder(max_len=32)):
        with pytest.raises(ValueError, match=naming("RankEncoder(cls=True)", "encoder=")):
            built(family, encoder=encoder)


def test_sentences_longer_than_the_positions_are_an_error():
    with pytest.raises(ValueError, match=naming("max_len", 64, 32)):
        built("gpt2", encoder=RankEncoder(max_len=64, cls=True))
    assert built("xlnet", encoder=RankEncoder(max_len=64, cls=True)).encoder.max_len == 64  # positions are relative


@every_family
def test_checkpointing_gives_the_same_gradient(family, mixed):
    model = built(family)
    batch = mixed(model)
    objective = own_objective(model)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        objective(model, batch, 0).sum.backward()
        gradients.append(model.gene_table().grad.clone())
        model.speed_up(checkpointing=True)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("family", "n_tokens", "a_token", "n_weights"),
    [("gpt2", 25_426, 512, 51_372_032), ("albert", 25_427, 129, 6_696_019), ("xlnet", 25_426, 513, 54_024_530)],
)
def test_weights_of_base_with_the_genes_of_geneformer(family, n_tokens, a_token, n_weights):
    model = models.build(family, vocab=["a", "b"])
    assert model.n_parameters + (n_tokens - len(model.vocab)) * a_token == n_weights
