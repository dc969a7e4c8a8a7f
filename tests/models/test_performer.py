"""Linear attention against softmax attention, and its random features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scllm.models.performer import PerformerAttention, attend_linearly, redraw


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
