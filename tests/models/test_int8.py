"""Int8 weights: what they are, in every family, in memory and in files."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from compressed import FAMILIES, built, cosines, embedding
from messages import naming
from safetensors.torch import load_file
from torch import nn

from scllm import models, tl
from scllm.models.int8 import Int8Embedding, Int8Linear, round_rows, to_float, to_int8
from scllm.models.layers import linear_cross_entropy


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(24, 10).requires_grad_(False)


def small(family, adata, dtype="int8"):
    model = built(family, adata.var_names)
    after = copy.deepcopy(model)
    to_int8(after, dtype)
    return model, after


def rounded_slowly(matrix):
    """Row by row, number by number."""
    out, scales = np.zeros(matrix.shape, np.int8), []
    for i, row in enumerate(np.asarray(matrix, np.float64)):
        scales.append(max(abs(row)) / 127 or 1.0)
        out[i] = [round(number / scales[-1]) for number in row]
    return out, np.array(scales)


def test_each_row_is_rounded_to_steps_of_its_own(linear):
    weight = linear.weight.clone()
    weight[3] *= 100
    weight[4] = 0
    rounded, scale = round_rows(weight)
    expected, steps = rounded_slowly(weight.numpy())
    assert rounded.dtype == torch.int8
    assert np.abs(rounded.numpy().astype(int) - expected).max() == 0
    np.testing.assert_allclose(scale[:, 0], steps, rtol=1e-6)
    assert ((rounded * scale - weight).abs() <= 0.5001 * scale).all()


def test_a_layer_computes_with_its_rounded_weights(linear):
    int8, x = Int8Linear(linear, dynamic=False), torch.randn(7, 24)
    expected, steps = rounded_slowly(linear.weight.numpy())
    by_hand = x.double().numpy() @ (expected * steps[:, None]).T + linear.bias.double().numpy()
    np.testing.assert_allclose(int8(x), by_hand, atol=1e-5)
    assert int8.weight.shape == linear.weight.shape


def test_rounding_is_that_of_torchao(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        theirs = nn.Sequential(copy.deepcopy(linear))
        quantize_(theirs, Int8WeightOnlyConfig())
        x = torch.randn(50, 24)
        found = theirs(x)
    ours = Int8Linear(linear, dynamic=False)
    # torchao's steps are max / 127.5, so numbers fall differently, but as near
    theirs_off, ours_off = ((y - linear(x)).norm() for y in (found, ours(x)))
    assert (found - ours(x)).norm() < 1.5 * theirs_off
    assert 0.8 < ours_off / theirs_off < 1.25


def test_products_of_integers_are_those_of_rounded_activations(linear):
    int8, x = Int8Linear(linear, dynamic=True), torch.randn(600, 24)
    weight, steps = rounded_slowly(linear.weight.numpy())
    tokens, sizes = rounded_slowly(x.numpy())
    by_hand = (tokens.astype(int) @ weight.T.astype(int)) * sizes[:, None] * steps + linear.bias.numpy()
    found = int8(x).numpy()
    assert np.mean(np.abs(found - by_hand) < 1e-4) > 0.99  # a number on the edge of two steps may fall either way
    np.testing.assert_allclose(found, linear(x), atol=0.1)
    assert int8(x[:0]).shape == (0, 10)
    # whatever else is in the batch
    np.testing.assert_array_equal(int8(x[255:258]), found[255:258])
    np.testing.assert_array_equal(int8(x.view(3, 200, 24)), found.reshape(3, 200, 10))


def test_gradients_pass_through_layers_whose_activations_are_rounded(linear):
    int8, x = Int8Linear(linear, dynamic=True), torch.randn(3, 24, requires_grad=True)
    int8(x).sum().backward()
    torch.testing.assert_close(x.grad, int8.weight.sum(0).expand(3, 24))


def test_a_table_gives_rounded_rows():
    table = nn.Embedding(30, 12)
    int8, ids = Int8Embedding(table), torch.tensor([[3, 3], [29, 0]])
    expected, steps = rounded_slowly(table.weight.detach().numpy())
    np.testing.assert_allclose(int8(ids), (expected * steps[:, None])[ids.numpy()], atol=1e-6)
    torch.testing.assert_close(int8(ids), int8.weight[ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_itself(family, adata):
    model, after = small(family, adata)
    assert cosines(embedding(adata, model), embedding(adata, after)).min() > 0.999
    table = after.gene_table()
    assert table.dtype == torch.float32
    assert (table - model.gene_table()).abs().max() < 0.01 * model.gene_table().abs().max()
    assert "int8 weights" in repr(after)
    assert after.n_parameters == model.n_parameters
    probabilities = [
        tl.classify(adata, one, key_added="label", copy=True).obsm["label_probabilities"] for one in (model, after)
    ]
    assert np.abs(probabilities[0] - probabilities[1]).max() < 0.02
    filled = [tl.reconstruct(adata, one, copy=True) for one in (model, after)]
    assert set(filled[1].layers) == set(filled[0].layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_int8_and_loads_to_the_bit(family, adata, tmp_path):
    model, after = small(family, adata)
    after.save(tmp_path / "small")
    model.save(tmp_path / "full")
    stored, full = (load_file(tmp_path / name / "weights.safetensors") for name in ("small", "full"))
    rounded = {name for name, weight in stored.items() if weight.dtype == torch.int8}
    long = [w for w in full.values() if w.ndim > 1 and w.shape[1] >= 8 and w.numel() > 200]
    n_int8 = sum(stored[name].numel() for name in rounded)
    # all matrices but random features, and XLNet's biases and segments, which are no linear layers
    assert n_int8 > 0.95 * sum(w.numel() for w in long)
    assert n_int8 > 0.9 * sum(w.numel() for w in full.values())
    assert not any(w.numel() > 4000 and w.dtype == torch.float32 for w in stored.values())
    again = models.load(tmp_path / "small")
    assert again.hash() == after.hash() == copy.deepcopy(after).hash()
    assert (again.weight_dtype, again.config) == ("int8", model.config)
    np.testing.assert_array_equal(embedding(adata, again), embedding(adata, after))


@pytest.mark.parametrize("family", FAMILIES)
def test_integer_products_are_near_and_repeat_to_the_bit(family, adata, tmp_path):
    model, after = small(family, adata, "int8_dynamic")
    found = embedding(adata, after)
    assert cosines(embedding(adata, model), found).min() > 0.998
    assert np.abs(found - embedding(adata, model)).max() > 1e-6
    np.testing.assert_allclose(embedding(adata[5:9], after), found[5:9], atol=1e-4)
    after.save(tmp_path / "model")
    again = models.load(tmp_path / "model")
    assert again.weight_dtype == "int8_dynamic"
    np.testing.assert_array_equal(embedding(adata, again), found)


@pytest.mark.parametrize("family", ["geneformer", "gpt2", "albert", "xlnet"])
def test_genes_are_predicted_from_the_tied_table(family, adata):
    model, after = small(family, adata)
    for one in (model, after):
        tl.perplexity(adata, one, key_added=f"perplexity_{one.weight_dtype}")
    np.testing.assert_allclose(adata.obs["perplexity_int8"], adata.obs["perplexity_float32"], rtol=0.05)
    assert len(adata.obs["perplexity_int8"].unique()) > 10


def test_tied_weights_are_held_and_stored_once(adata):
    for family in ("gpt2", "albert", "xlnet"):
        _, after = small(family, adata)
        head, table = after.network.get_output_embeddings(), after.network.get_input_embeddings()
        assert head.weight_int8 is table.weight_int8
        again = copy.deepcopy(after)
        head, table = again.network.get_output_embeddings(), again.network.get_input_embeddings()
        assert head.weight_int8 is table.weight_int8


def test_a_loss_that_reads_weights_is_that_of_the_layer(linear):
    int8, target = Int8Linear(linear, dynamic=False), torch.tensor([0, 3, 9])
    x = torch.randn(3, 24)
    expected = nn.functional.cross_entropy(int8(x), target, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(x, int8.weight, int8.bias, target), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_come_back_within_half_a_step(family, adata):
    model, after = small(family, adata)
    to_float(after)
    weights = after.state_dict()
    assert set(weights) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        assert weights[name].dtype == weight.dtype
        assert (weights[name].float() - weight.float()).abs().max() <= 0.5001 * weight.abs().max() / 127 or (
            torch.equal(weights[name], weight)
        )


def test_published_formats_get_floats(adata, tmp_path):
    model, after = small("scgpt", adata)
    after.save(tmp_path / "theirs", format="scgpt")
    again = models.load(tmp_path / "theirs", family="scgpt")
    assert (after.weight_dtype, again.weight_dtype) == ("int8", "float32")
    table = again.gene_table()[: len(model.vocab)]
    torch.testing.assert_close(table, after.gene_table())
    assert not torch.equal(table, model.gene_table())


def test_a_file_of_unknown_numbers_is_an_error(adata, tmp_path):
    _, after = small("scgpt", adata)
    after.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weight_dtype": "int2"}))
    with pytest.raises(ValueError, match=naming("'int2'", "'int8'", "'int8_dynamic'")):
        models.load(tmp_path / "model")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["int8", "int8_dynamic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_on_a_gpu(family, dtype, adata):
    model, after = small(family, adata, dtype)
    expected = embedding(adata, model, device="cpu")
    assert cosines(expected, embedding(adata, after, device="cuda", precision="fp32")).min() > 0.999
    assert cosines(expected, embedding(adata, after, device="cuda", precision="bf16")).min() > 0.995
