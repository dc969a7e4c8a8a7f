"""Linear attention against softmax attention, and its random features."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from scllm.models import performer
from scllm.models.performer import PerformerAttention, PerformerBlock, attend_linearly, redraw


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 2, 8, generator=generator) * 0.5 for _ in range(3)]


def exact(query, key, value, lengths):
    cells = zip(query.split(lengths), key.split(lengths), value.split(lengths))
    attended = [
        nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in cell)).transpose(0, 1) for cell in cells
    ]
    return torch.cat(attended)


def test_many_features_approach_softmax_attention(qkv):
    projection = torch.randn(40_000, 8, generator=torch.Generator().manual_seed(1))
    error = attend_linearly(*qkv, projection, [5, 7], "cell") - exact(*qkv, [5, 7])
    assert error.abs().max() < 0.03
    assert exact(*qkv, [5, 7]).abs().max() > 0.3


def test_a_cell_depends_on_its_neighbours_only_with_the_maximum_of_the_batch(qkv):
    qkv[1][5:] *= 20  # keys of the second cell raise the common maximum
    projection = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    alone = attend_linearly(*(x[:5] for x in qkv), projection, [5], "cell")
    for form, close in (("cell", True), ("batch", False)):
        together = attend_linearly(*qkv, projection, [5, 7], form)[:5]
        assert torch.allclose(together, alone, atol=1e-6) is close


def test_features_are_orthogonal_in_blocks_and_as_long_as_normal_vectors():
    torch.manual_seed(0)
    projection = PerformerAttention(20, 2, 16, False, "cell").projection
    assert projection.shape == (44, 16)  # floor(16 ln 16)
    products = projection[:16] @ projection[:16].T
    torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-4, rtol=0)
    assert 3 < projection.norm(dim=1).mean() < 5  # sqrt(16) on average


def test_gradients_reach_all_projections(qkv):
    attention = PerformerAttention(6, 2, 8, True, "cell")
    batch = type("Lengths", (), {"lengths": (3, 4)})
    attention(torch.randn(7, 6), batch).square().sum().backward()
    # a bias of all keys changes features of keys alike but for the floor: its gradient is small, not none
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in attention.parameters())


@pytest.fixture
def attentions():
    return nn.ModuleList(PerformerAttention(6, 2, 8, False, "cell") for _ in range(2))


def test_features_are_redrawn_as_a_function_of_the_step(attentions):
    before = [attention.projection.clone() for attention in attentions]
    for step, every in ((0, 5), (4, 5), (6, 5), (10, None)):
        redraw(attentions, step, 0, every)
    assert all(torch.equal(a.projection, b) for a, b in zip(attentions, before))
    redraw(attentions, 5, 0, 5)
    first = [attention.projection.clone() for attention in attentions]
    assert not any(torch.equal(a, b) for a, b in zip(first, before))
    assert not torch.equal(*first)
    redraw(attentions, 10, 0, 5)
    redraw(attentions, 5, 0, 5)
    assert all(torch.equal(a.projection, b) for a, b in zip(attentions, first))


def test_frozen_attention_keeps_its_features(attentions):
    attentions[0].eval()
    before = [attention.projection.clone() for attention in attentions]
    redraw(attentions, 5, 0, 5)
    assert [torch.equal(a.projection, b) for a, b in zip(attentions, before)] == [True, False]


def test_long_cells_are_read_in_parts(qkv):
    long = [x.repeat(100, 1, 1) for x in qkv]
    projection = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    # repeated keys weigh alike: what is attended to stays the same
    together = attend_linearly(*long, projection, [1200], "cell")
    torch.testing.assert_close(together[:12], attend_linearly(*qkv, projection, [12], "cell"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("key_maximum", ["cell", "batch"])
@pytest.mark.parametrize("cell_by_cell", [True, False], ids=["cell by cell", "together"])
def test_the_gradient_is_that_of_small_changes(qkv, key_maximum, cell_by_cell):
    inputs = [x.double().requires_grad_() for x in qkv]
    projection = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).double()
    exact = written_out(*inputs, projection, [5, 0, 7], key_maximum)
    found = attend_linearly(*inputs, projection, [5, 0, 7], key_maximum, cell_by_cell=cell_by_cell)
    torch.testing.assert_close(found, exact)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).double()
    gradients = (torch.autograd.grad((out * weight).sum(), inputs) for out in (found, exact))
    torch.testing.assert_close(*gradients)


def written_out(query, key, value, projection, lengths, key_maximum):
    """The formulas of scBERT's Performer, for one cell after the other, differentiated by torch."""

    def exponents(x):
        return (x * 8**-0.25) @ projection.T

    def features(x, highest):
        return 16**-0.5 * (torch.exp(exponents(x) - x.square().sum(-1, keepdim=True) / (2 * 8**0.5) - highest) + 1e-4)

    found = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value))):
        if len(q):
            of_keys = exponents(key if key_maximum == "batch" else k).detach().max()
            kernel = torch.einsum(
                "qhm,khm->hqk", features(q, exponents(q).detach().amax(-1, keepdim=True)), features(k, of_keys)
            )
            found.append(torch.einsum("hqk,khe->qhe", kernel / kernel.sum(-1, keepdim=True), v))
    return torch.cat(found)


def test_cells_of_any_length_are_computed_together(qkv):
    long = [x.repeat(50, 1, 1) for x in qkv]
    lengths = [1, 200, 190, 0, 7, 202]
    projection = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    found, expected = (attend_linearly(*long, projection, lengths, "cell", cell_by_cell=one) for one in (False, True))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def kept_bytes(module, *inputs):
    """Bytes of all tensors that a forward pass keeps for the backward pass, without the weights."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(*inputs)
    for weight in (*module.parameters(), *module.buffers()):
        kept.pop(weight.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("cell_by_cell", [True, False], ids=["cell by cell", "together"])
def test_few_bytes_per_token_are_kept_for_the_gradient(cell_by_cell, monkeypatch):
    # the widths of scBERT: queries, keys, values and result have 640 numbers, the features of queries and keys 5,320
    monkeypatch.setattr(performer, "attend_linearly", partial(attend_linearly, cell_by_cell=cell_by_cell))
    block = PerformerBlock(200, 10, 64, 800, 0.0, False, "cell").train()
    lengths = (1_500, 1_500)
    batch = type("Lengths", (), {"lengths": lengths})
    x = torch.randn(sum(lengths), 200, requires_grad=True)
    # 10.2 kB for those four, 6.4 kB inside the feed-forward layer, 0.8 kB for each input of a layer or norm, and the
    # matrix of 692 kB per cell; features alone would take 42 kB
    assert kept_bytes(block, x, batch) / len(x) < 24_000
