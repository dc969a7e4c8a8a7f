"""Ragged token sequences against lists of arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.strategies import ragged, rows_of

from scllm.data.tokens import Tokens

cells = ragged(kinds=("counts", "ties"), dtypes=(np.float32,))
seeds = st.integers(0, 2**32)


def tokens_of(rows) -> Tokens:
    indptr, values = rows
    return Tokens(indptr, np.arange(len(values), dtype=np.int32), values)


def as_lists(tokens: Tokens) -> list[tuple[list, list]]:
    pairs = zip(rows_of(tokens.indptr, tokens.genes), rows_of(tokens.indptr, tokens.values), strict=True)
    return [(genes.tolist(), values.tolist()) for genes, values in pairs]


@settings(deadline=None)
@given(cells, seeds)
def test_taking_cells_is_indexing_a_list(rows, seed):
    tokens = tokens_of(rows)
    chosen = np.random.default_rng(seed).integers(0, max(1, len(tokens)), 5 if len(tokens) else 0)
    expected = as_lists(tokens)
    assert as_lists(tokens.take(chosen)) == [expected[i] for i in chosen]
    assert as_lists(tokens.take(slice(1, None, 2))) == expected[1::2]


@settings(deadline=None)
@given(cells, st.integers(0, 6), st.integers(0, 6))
def test_neighbours_are_a_slice_of_the_list(rows, start, length):
    tokens = tokens_of(rows)
    start, stop = min(start, len(tokens)), min(start + length, len(tokens))
    assert as_lists(tokens.slice(start, stop)) == as_lists(tokens)[start:stop]


@settings(deadline=None)
@given(cells, st.integers(0, 30))
def test_cropping_keeps_the_highest_values_and_of_equal_ones_the_first(rows, max_len):
    tokens = tokens_of(rows)
    for (genes, values), (kept, _) in zip(as_lists(tokens), as_lists(tokens.crop(max_len)), strict=True):
        best = sorted(range(len(genes)), key=lambda j: (-values[j], j))[:max_len]
        assert kept == [genes[j] for j in sorted(best)]


@settings(deadline=None)
@given(cells, st.integers(0, 30), seeds)
def test_cropping_at_random_keeps_a_subset_in_order(rows, max_len, seed):
    tokens = tokens_of(rows)
    cropped = tokens.crop(max_len, np.random.default_rng(seed))
    for (genes, _), (kept, _) in zip(as_lists(tokens), as_lists(cropped), strict=True):
        assert len(kept) == min(len(genes), max_len)
        assert kept == [gene for gene in genes if gene in set(kept)]


def test_rank_ordered_sequences_keep_their_first_tokens():
    ranks = Tokens(np.array([0, 3, 4]), np.array([7, 5, 6, 1], np.int32), None)
    assert ranks.crop(2).genes.tolist() == [7, 5, 1]
    assert ranks.take(np.array([1, 0])).genes.tolist() == [1, 7, 5, 6]


@settings(deadline=None)
@given(cells, st.none() | st.integers(0, 30))
def test_padding_fills_up_or_cuts_at_the_end(rows, length):
    tokens = tokens_of(rows)
    width = length if length is not None else max(tokens.lengths, default=0)
    genes, values = tokens.padded(pad_id=-7, pad_value=-2, length=length)
    for cell, (expected, beside) in enumerate(as_lists(tokens)):
        missing = width - len(expected)
        assert genes[cell].tolist() == expected[:width] + [-7] * missing
        assert values[cell].tolist() == beside[:width] + [-2] * missing


def test_no_cells_are_no_tokens():
    empty = tokens_of((np.array([0]), np.empty(0, np.float32)))
    assert len(empty.crop(3)) == len(empty.take(np.empty(0, np.int64))) == 0
    assert empty.padded(pad_id=0)[0].shape == (0, 0)


@pytest.mark.parametrize("max_len", [1, 2])
def test_nothing_is_copied_where_all_fits(max_len):
    tokens = tokens_of((np.array([0, 1, 2]), np.ones(2, np.float32)))
    assert tokens.crop(max_len) is tokens
