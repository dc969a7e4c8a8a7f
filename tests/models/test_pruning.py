"""Weights, heads and neurons that are taken out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from compressed import FAMILIES, built, cosines, embedding
from messages import naming
from torch.utils.flop_counter import FlopCounterMode

from scllm import models, tl
from scllm.models.base import Batch
from scllm.models.pruning import prune_structured, prune_weights

# the matrices that read heads and neurons, whose columns go with them; XLNet's is (d, h, e)
READERS = ("attention.out.weight", "down.weight", "c_proj.weight", "dense.weight", "ffn_output.weight",
           "layer_2.weight", "rel_attn.o")  # fmt: skip


def pruned(model, amount):
    after = copy.deepcopy(model)
    prune_structured(after, amount)
    return after


def zeroed(model, after):
    """The whole model, in which what is not found again in the pruned one is zero; and how many columns that are."""
    before, left = copy.deepcopy(model), dict(after.named_parameters())
    buffers = dict(before.named_buffers())
    n_gone = {}
    for name, weight in before.named_parameters():
        if name.endswith(READERS) and weight.shape != left[name].shape:
            mine = weight.detach().movedim(1, 0).flatten(1)
            theirs = left[name].detach().movedim(1, 0).flatten(1)
            gone = ~torch.tensor([any(torch.equal(column, other) for other in theirs) for column in mine])
            assert gone.sum() == len(mine) - len(theirs)
            weight.data[:, gone] = 0
            n_gone[name] = int(gone.sum())
            if name.replace("out.weight", "projection") in buffers:
                # a Performer subtracts the largest key of all heads: those that are gone must not be it
                keys = before.get_submodule(name.replace(".out.weight", ".key"))
                for parameter in keys.parameters():
                    parameter.data[gone] = 0
    return before, n_gone


def cells(model, adata, n=4):
    """A batch as the family reads it."""
    caught = []
    adata = adata[:n].copy()
    hidden = type(model).hidden
    probe = copy.deepcopy(model)
    probe.hidden = lambda batch, **more: (caught.append(batch), hidden(probe, batch, **more))[1]
    tl.embed(adata, probe, device="cpu")
    return caught[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_heads_and_neurons_is_that_with_them_at_zero(family, adata):
    model = built(family, adata.var_names)
    after = pruned(model, 0.4)
    slow, n_gone = zeroed(model, after)
    assert n_gone
    np.testing.assert_allclose(embedding(adata, after), embedding(adata, slow), atol=1e-5)
    assert np.abs(embedding(adata, after) - embedding(adata, model)).max() > 1e-4
    if "cls" in after.poolings:
        # the last block computed for all tokens, and for the first alone
        whole, first = (after.hidden(cells(model, adata), first_only=which) for which in (False, True))
        torch.testing.assert_close(whole[cells(model, adata).first], first, atol=1e-5, rtol=1e-4)


def test_the_decoder_of_scfoundation_shrinks_too(adata):
    model = built("scfoundation", adata.var_names)
    after = pruned(model, 0.5)
    slow, n_gone = zeroed(model, after)
    assert {name.split(".")[0] for name in n_gone} == {"layers", "decoder_layers"}
    found, expected = (tl.reconstruct(adata, one, copy=True).layers for one in (after, slow))
    assert set(found) == set(expected)
    for name in set(found) - set(adata.layers):
        a, b = (layer.toarray() if hasattr(layer, "toarray") else layer for layer in (found[name], expected[name]))
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_stands_in_the_configuration_and_loads_to_the_bit(family, adata, tmp_path):
    after = pruned(built(family, adata.var_names), 0.3)
    assert sum(heads for heads, _ in after.config.block_sizes()) < 4 * len(after.config.block_sizes())
    assert after.config.block_sizes() == [
        (heads, hidden) for heads, hidden in zip(after.config.block_heads, after.config.block_hidden)
    ]
    assert "pruned to " in repr(after)
    after.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert (again.config, again.hash()) == (after.config, after.hash())
    np.testing.assert_array_equal(embedding(adata, again), embedding(adata, after))
    probabilities = tl.classify(adata, again, key_added="label", copy=True).obsm["label_probabilities"]
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_models_compute_less(family, adata):
    model = built(family, adata.var_names)
    after = pruned(model, 0.5)
    batch = cells(model, adata)
    counted = []
    for one in (model, after):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one.hidden(batch)
        counted.append(counter.get_total_flops())
    said = after.forward_flops(30) / model.forward_flops(30)
    assert counted[1] < 0.7 * counted[0]
    # what is counted holds small layers around the blocks, which stay, and not all kinds of attention
    assert counted[1] / counted[0] == pytest.approx(said, abs=0.12)
    assert after.n_parameters < 0.85 * model.n_parameters


@pytest.mark.parametrize("family", ["scgpt", "scbert", "gpt2", "albert", "xlnet"])
def test_a_head_stays_in_every_block(family, adata):
    after = pruned(built(family, adata.var_names), 0.99)
    assert set(after.config.block_heads) == {1}
    assert min(after.config.block_hidden) >= 1
    assert np.isfinite(embedding(adata, after)).all()


def test_the_heads_and_neurons_of_smallest_norm_go(adata):
    model = built("scgpt", adata.var_names)
    width = 16
    for layer, head in ((0, 2), (1, 0), (1, 3)):
        rows = slice(head * width, (head + 1) * width)
        for part in model.layers[layer].attention.qkv.weight.data.view(3, 64, 64):
            part[rows] *= 0.01
        model.layers[layer].attention.out.weight.data[:, rows] *= 0.01
    model.layers[0].up.weight.data[40:] *= 0.01
    model.layers[0].down.weight.data[:, 40:] *= 0.01
    after = pruned(model, 3 / 8)
    assert after.config.block_heads == (3, 2)
    assert after.config.block_hidden == (40, 40)
    torch.testing.assert_close(after.layers[0].up.weight, model.layers[0].up.weight[:40])
    kept = [i for i in range(64) if i // width in (1, 2)]
    torch.testing.assert_close(after.layers[1].attention.out.weight, model.layers[1].attention.out.weight[:, kept])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_smallest_share_of_each_matrix_is_zero(family, adata, tmp_path):
    model = built(family, adata.var_names)
    after = copy.deepcopy(model)
    prune_weights(after, 0.3)
    n_matrices = 0
    for name, weight in after.named_parameters():
        before = model.get_parameter(name)
        if not (weight == 0).any() or torch.equal(weight, before):
            torch.testing.assert_close(weight, before)
            continue
        n_matrices += 1
        assert (weight == 0).sum() == round(0.3 * weight.numel())
        assert before[weight == 0].abs().max() <= before[weight != 0].abs().min()
        torch.testing.assert_close(weight[weight != 0], before[weight != 0])
    n_blocks = len(list(after.prunable()["block"]))
    assert n_matrices >= 4 * n_blocks
    torch.testing.assert_close(after.gene_table(), model.gene_table())
    assert "30% of the linear weights are zero" in repr(after) or "pruned" in repr(after)
    after.save(tmp_path / "model")
    assert models.load(tmp_path / "model").hash() == after.hash()
    assert cosines(embedding(adata, model), embedding(adata, after)).mean() > 0.5


def test_networks_whose_heads_are_not_known_are_an_error(adata):
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=64)  # fmt: skip
    model = built("gpt2", adata.var_names, hf_config=config, max_len=64, size="tiny")
    with pytest.raises(ValueError, match=naming("'LlamaDecoderLayer'", "structured=False")):
        prune_structured(model, 0.3)


def test_published_formats_hold_no_pruned_blocks(adata, tmp_path):
    after = pruned(built("scgpt", adata.var_names), 0.3)
    with pytest.raises(ValueError, match=naming("scgpt", "heads left: ", "format='native'")):
        after.save(tmp_path / "model", format="scgpt")


def test_blocks_without_heads_are_an_error():
    with pytest.raises(ValueError, match=naming("block_heads", "[2, 0]")):
        models.build("scgpt", vocab=["a"], size="tiny", block_heads=(2, 0))


def test_a_batch_of_no_cells_goes_through(adata):
    after = pruned(built("scgpt", adata.var_names), 0.5)
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = Batch(nothing, torch.zeros(0), torch.zeros(1, dtype=torch.int32), (), nothing)
    assert after.embed(batch).shape == (0, 64)
