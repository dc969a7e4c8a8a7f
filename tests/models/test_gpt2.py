"""GPT-2 against transformers itself, and other networks of transformers in its place."""

from __future__ import annotations

import json

import pytest
import torch
from messages import naming
from models.sentences import built, nats, shuffled, train
from transformers import (
    BartConfig,
    BertConfig,
    FNetConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    RobertaConfig,
    XLNetConfig,
)

from scllm import models
from scllm.engine.objectives import NextGene, objective_from_dict
from scllm.metrics import permutation_bound
from scllm.tl import pretrain

LLAMA = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=32,
)  # fmt: skip
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def theirs():
    """GPT-2 of transformers with weights of ours, whose linear layers lie the other way round."""

    def make(model):
        config = GPT2Config(
            vocab_size=len(model.vocab), n_layer=2, n_head=2, n_embd=32, n_inner=128, n_positions=32,
            activation_function="gelu_pytorch_tanh", bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        network = GPT2LMHeadModel(config).eval()
        weights = {name.removeprefix("network."): weight for name, weight in model.state_dict().items()}
        turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
        weights = {name: weight.T if name.endswith(turned) else weight for name, weight in weights.items()}
        missing, surplus = network.load_state_dict(weights, strict=False)
        assert (missing, surplus) == (["lm_head.weight"], [])  # the gene table again
        return network

    return make


@torch.no_grad()
def test_nats_are_the_loss_of_transformers_times_predicted_genes(theirs):
    model = built("gpt2").eval()
    network = theirs(model)
    for length in (1, 2, 7, 24):
        batch = shuffled(model, 1, length, seed=length)
        n = length + 1  # `<cls>` too
        loss = network(input_ids=batch.genes[None], labels=batch.genes[None]).loss
        ours = NextGene()(model, batch, 0)
        assert int(ours.count) == n - 1
        torch.testing.assert_close(ours.sum, loss * (n - 1), rtol=1e-5, atol=1e-5)


def test_many_genes_give_the_same_loss_and_gradient_without_all_logits():
    model = built("gpt2").eval()
    batch = shuffled(model, 8, 20, seed=0)  # more genes than the width: torch goes by chunks
    at = torch.nonzero(~model.is_special[batch.genes]).squeeze(1)
    found = []
    for whole in (False, True):
        model.zero_grad()
        if whole:
            logits = model.gene_logits(batch, at)
            loss = torch.nn.functional.cross_entropy(logits, batch.genes[at], reduction="sum")
        else:
            loss = NextGene()(model, batch, 0).sum
        loss.backward()
        found.append((loss.detach(), model.gene_table().grad.clone()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_published_size():
    # 124 M of the published model are 50,257 tokens and 1,024 positions of width 768, and 85 M in its blocks
    with torch.device("meta"):
        network = GPT2LMHeadModel(GPT2Config())
    model = models.build("gpt2", vocab=[f"g{i}" for i in range(100)], size="gpt2")
    without_tokens = network.num_parameters() - 50_257 * 768
    assert model.n_parameters == without_tokens + 102 * 768
    assert model.n_parameters + (25_426 - 102) * 768 == 105_369_600


def test_llama_in_place_of_gpt2(tmp_path):
    model = built("gpt2", 12, hf_config=LLAMA)
    assert (model.config.n_layers, model.config.n_heads, model.config.d_model) == (2, 2, 32)
    assert model.likelihood == "causal"
    assert model.vocab.specials == ("<cls>", "<pad>")
    assert len(model.blocks) == 2
    json.dumps(model.config.hf_config)
    train(model, lambda step: shuffled(model, 64, 12, step), steps=120, lr=5e-3)
    batch = shuffled(model, 64, 12, seed=10**6)
    assert permutation_bound([12]) - 0.05 < nats(model, batch) < 2.6
    model.save(tmp_path / "llama")
    again = models.load(tmp_path / "llama")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(model.hidden(batch), again.hidden(batch))


@pytest.mark.parametrize(
    ("config", "likelihood"),
    [
        (BertConfig(**BERT, max_position_embeddings=32), "pseudo"),
        (BertConfig(**BERT, max_position_embeddings=32, is_decoder=True), "causal"),
        (RobertaConfig(**BERT, max_position_embeddings=64), "pseudo"),
    ],
)
def test_the_likelihood_follows_from_the_configuration(config, likelihood):
    model = built("gpt2", hf_config=config).eval()
    assert model.likelihood == likelihood
    assert ("<mask>" in model.vocab) == (likelihood == "pseudo")
    objective = objective_from_dict(model.config.objective())
    assert objective(model, shuffled(model, 4, 20, 0), 0).sum.isfinite()
    batch = shuffled(model, 3, 20, 0)
    with torch.no_grad():
        one = shuffled(model, 1, 20, 0)
        torch.testing.assert_close(model.embed(batch)[:1], model.embed(one), atol=1e-5, rtol=0)


def test_configurations_do_not_make_transformers_fetch_code():
    plain = LLAMA.to_dict() | {
        "auto_map": {"AutoModelForCausalLM": "somebody/model--code.Model"},
        "attn_implementation": "kernels-community/flash-attn",
        "dtype": "bfloat16",
    }
    model = built("gpt2", hf_config=plain)
    assert model.gene_table().dtype == torch.float32
    assert type(model.network).__module__ == "transformers.models.llama.modeling_llama"
    assert model.network.config._attn_implementation == "sdpa"


def test_networks_that_see_padding_are_refused():
    with pytest.raises(ValueError, match=naming("'fnet'", "padding")):
        built("gpt2", hf_config=FNetConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2))


@torch.no_grad()
def test_logits_are_those_of_the_whole_network_also_where_its_head_does_more():
    gemma = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = built("gpt2", hf_config=gemma).eval()
    model.gene_table().mul_(50)  # logits so large that Gemma caps them
    batch = shuffled(model, 1, 8, seed=0)
    at = torch.arange(1, 9)
    expected = model.network(input_ids=batch.genes[None]).logits[0, :-1]
    torch.testing.assert_close(model.gene_logits(batch, at), expected)
    assert not torch.allclose(model.network.lm_head(model.hidden(batch))[:-1], expected, atol=1e-2)


def test_dropout_is_that_of_the_configuration(adata):
    bert = BertConfig(**BERT, max_position_embeddings=64, hidden_dropout_prob=0.3)
    model = models.build("gpt2", vocab=adata.var_names, hf_config=bert)
    assert model.config.dropout == 0.3
    with pytest.raises(TypeError, match=naming("dropout=0.1", "hf_config", 0.3)):
        pretrain(adata, model, dropout=0.1)


def test_networks_that_are_no_gene_language_models_are_refused():
    with pytest.raises(ValueError, match=naming("hf_config", "'bart'")):
        built("gpt2", hf_config=BartConfig())
    with pytest.raises(ValueError, match=naming("hf_config", "'xlnet'", "'permutation'", "'causal'")):
        built("gpt2", hf_config=XLNetConfig(d_model=32, n_head=2, n_layer=1))
    with pytest.raises(ValueError, match=naming("hf_config", "'llama'", "'gpt2'")):
        built("albert", hf_config=LLAMA)


def test_the_first_token_is_no_embedding():
    assert built("gpt2").poolings == ("mean", "ranked", "linear", "max")
