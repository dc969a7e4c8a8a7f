"""ALBERT against transformers itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from messages import naming
from models.sentences import built, shuffled
from transformers import AlbertConfig, AlbertForMaskedLM

from scllm import models
from scllm.engine.objectives import MaskedGene
from scllm.engine.optim import freeze


@torch.no_grad()
def test_nats_are_the_loss_of_transformers_on_hidden_genes():
    model = built("albert", d_embedding=16).eval()
    config = AlbertConfig(
        vocab_size=len(model.vocab), num_hidden_layers=2, num_attention_heads=2, hidden_size=32,
        intermediate_size=128, embedding_size=16, max_position_embeddings=32, hidden_act="gelu_pytorch_tanh",
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    network = AlbertForMaskedLM(config).eval()
    weights = {name.removeprefix("network."): weight for name, weight in model.state_dict().items()}
    missing, surplus = network.load_state_dict(weights, strict=False)
    assert (set(missing), surplus) == ({"predictions.decoder.weight", "predictions.decoder.bias"}, [])
    batch = shuffled(model, 6, 12, seed=0)
    at = torch.tensor([3, 15, 16, 40])
    shown = replace(batch, genes=batch.genes.index_fill(0, at, model.vocab.mask_id))
    labels = torch.full_like(batch.genes, -100).index_copy(0, at, batch.genes[at])
    loss = network(input_ids=shown.genes.view(6, 13), labels=labels.view(6, 13)).loss
    logits = model.gene_logits(shown, at)
    ours = torch.nn.functional.cross_entropy(logits, batch.genes[at])
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)


def test_a_share_of_the_genes_is_hidden_and_most_of_those_masked(monkeypatch):
    model = built("albert")
    seen = {}

    def keep(batch, at):
        seen.update(genes=batch.genes, at=at)
        return torch.zeros(len(at), len(model.vocab))

    monkeypatch.setattr(model, "gene_logits", keep)
    batch = shuffled(model, 2000, 20, seed=0)
    loss = MaskedGene(p=0.3)(model, batch, 0)
    at, shown = seen["at"], seen["genes"]
    assert int(loss.count) == len(at)
    assert not model.is_special[batch.genes[at]].any()
    assert len(at) / (2000 * 20) == pytest.approx(0.3, abs=0.01)
    assert (shown[at] == model.vocab.mask_id).float().mean() == pytest.approx(0.8, abs=0.02)
    # of the tenth that is drawn anew, one in 24 is the same gene
    assert (shown[at] == batch.genes[at]).float().mean() == pytest.approx(0.1 + 0.1 / 24, abs=0.02)
    untouched = torch.ones(len(shown), dtype=torch.bool).index_fill(0, at, False)
    assert torch.equal(shown[untouched], batch.genes[untouched])


def test_all_layers_share_one_block():
    model = built("albert", n_layers=5)
    assert len(model.blocks) == 1
    assert built("albert", n_layers=2).n_parameters == model.n_parameters
    freeze(model, 1)
    assert not any(weight.requires_grad for weight in model.blocks[0].parameters())
    assert model.gene_table().requires_grad
    with pytest.raises(ValueError, match=naming("freeze", "0 to 1", "2")):
        freeze(model, 2)


def test_the_gene_table_is_narrow():
    model = built("albert", d_embedding=16)
    assert model.gene_table().shape == (27, 16)
    assert model.embed(shuffled(model, 2, 5, 0)).shape == (2, 32)


def test_masked_networks_only():
    model = built("albert", hf_config={"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2})
    assert model.likelihood == "pseudo"
    assert model.head_name is None  # its head is three modules
    assert MaskedGene(p=0.5)(model, shuffled(model, 4, 10, 0), 0).sum.isfinite()


def test_published_size():
    published = AlbertConfig(
        vocab_size=30_000, embedding_size=128, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, max_position_embeddings=512,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = AlbertForMaskedLM(published).num_parameters()
    model = models.build("albert", vocab=[f"g{i}" for i in range(100)], size="albert-base")
    # a row and an output bias for each token, a row for each position: 103 and 1,024 here
    assert model.n_parameters == theirs - (30_000 - 103) * 129 + (1024 - 512) * 128
    assert model.n_parameters + (25_427 - 103) * 129 == 10_697_299
