"""Attention of packed cells in rectangles against attention of each cell alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scllm.models.attention import attend, attend_in_rectangles, has_varlen
from scllm.models.base import Batch
from scllm.models.rectangles import groups, rectangles

CELLS = {
    "of all lengths": (5, 1, 17, 40, 38, 2, 90),
    "of one length": (12, 12, 12),
    "one": (7,),
    "some empty": (0, 9, 0, 9, 3, 0),
    "all empty": (0, 0),
}


def batch_of(lengths):
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return Batch(torch.zeros(sum(lengths), dtype=torch.int64), None, ends, tuple(lengths), torch.zeros(len(lengths)))


def packed(lengths, first_only, d_head=12):
    """Queries, keys and values with gradients, in float64."""
    generator = torch.Generator().manual_seed(0)
    n_queries = len(lengths) if first_only else sum(lengths)
    sizes = (n_queries, sum(lengths), sum(lengths))
    return [torch.randn(n, 3, d_head, generator=generator).double().requires_grad_() for n in sizes]


def by_hand(query, key, value, lengths, first_only):
    """Softmax attention, written out for one cell and one head after the other."""
    ends = np.cumsum([0, *lengths])
    out = query * 0
    for cell, (begin, end) in enumerate(pairwise(ends)):
        asked = slice(cell, cell + 1) if first_only else slice(begin, end)
        for head in range(query.shape[1] if end > begin else 0):
            scores = query[asked, head] @ key[begin:end, head].T / query.shape[2] ** 0.5
            out[asked, head] = torch.softmax(scores, 1) @ value[begin:end, head]
    return out


@pytest.mark.parametrize("lengths", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("first_only", [False, True], ids=["all tokens", "first"])
def test_rectangles_give_the_attention_of_each_cell_and_its_gradient(lengths, first_only):
    inputs = packed(lengths, first_only)
    found, expected = (
        attend_in_rectangles(*inputs, batch_of(lengths), first_only),
        by_hand(*inputs, lengths, first_only),
    )
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    found, expected = (
        torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True) for out in (found, expected)
    )
    for x, *both in zip(inputs, found, expected):
        # without tokens, keys and values take no part
        torch.testing.assert_close(*(torch.zeros_like(x) if gradient is None else gradient for gradient in both))


@pytest.mark.parametrize("lengths", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("first_only", [False, True], ids=["all tokens", "first"])
def test_a_cpu_gives_the_same(lengths, first_only):
    inputs = packed(lengths, first_only)
    found = attend(*inputs, batch_of(lengths), first_only=first_only)
    torch.testing.assert_close(found, by_hand(*inputs, lengths, first_only))


def test_a_cell_does_not_depend_on_its_neighbours():
    lengths = (30, 33, 29, 31)
    inputs = [x.detach().float() for x in packed(lengths, False)]
    together = attend_in_rectangles(*inputs, batch_of(lengths), False)[:30]
    alone = attend_in_rectangles(*(x[:30] for x in inputs), batch_of((30,)), False)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_values_of_neighbours_and_padding_are_never_read():
    lengths = (30, 33)
    query, key, value = (x.detach() for x in packed(lengths, False))
    value[30:] = torch.nan
    assert attend_in_rectangles(query, key, value, batch_of(lengths), False)[:30].isfinite().all()


@given(st.lists(st.integers(0, 3000), max_size=60))
def test_groups_hold_every_cell_once_and_little_padding(lengths):
    found = groups(lengths)
    assert sorted(cell for group in found for cell in group) == [i for i, n in enumerate(lengths) if n]
    for group in found:
        sizes = np.array(lengths)[group]
        assert (sizes >= sizes.max() * 7 / 8).all()
    assert len(found) <= 2 + np.log(max([*lengths, 1])) / np.log(8 / 7)


def test_every_token_has_one_place():
    lengths = CELLS["some empty"]
    at = rectangles(lengths, torch.device("cpu"))
    tokens = torch.arange(sum(lengths))
    assert torch.equal(at.join(at.split(tokens[:, None]))[:, 0], tokens)
    cells = torch.cat(at.cells)
    assert [int(cells[place]) if place >= 0 else None for place in at.order] == [None, 1, None, 3, 4, None]


def test_places_made_in_inference_serve_training():
    lengths = (3, 5, 4)
    with torch.inference_mode():
        rectangles(lengths, torch.device("cpu"))
    inputs = packed(lengths, False)
    attend_in_rectangles(*inputs, batch_of(lengths), False).sum().backward()
    assert all(x.grad is not None for x in inputs)


@pytest.mark.parametrize(
    ("capability", "dtype", "d_head", "there"),
    [
        ((9, 0), torch.bfloat16, 64, True),  # H100, H200
        ((8, 0), torch.float16, 128, True),  # A100
        ((12, 0), torch.bfloat16, 256, True),
        ((7, 5), torch.float16, 64, False),  # T4
        ((7, 0), torch.float16, 64, False),  # V100
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.bfloat16, 20, False),
        ((9, 0), torch.bfloat16, 264, False),
    ],
)
def test_varlen_attention_is_used_where_it_exists(capability, dtype, d_head, there):
    assert has_varlen(capability, dtype, d_head) is there
