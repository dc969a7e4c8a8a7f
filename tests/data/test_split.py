"""Splitting cells, by cell and by group."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from messages import naming

from scllm.data.split import split_cells

FRACTIONS = st.sampled_from([(0.5, 0.5), (0.97, 0.03), (0.8, 0.1, 0.1)])


@given(st.integers(10, 300), FRACTIONS, st.integers(0, 5))
def test_shares_are_met_to_the_cell(n_cells, fractions, seed):
    part = split_cells(n_cells, fractions, random_state=seed)
    counts = np.bincount(part, minlength=len(fractions))
    assert counts.sum() == n_cells
    assert np.abs(counts - np.array(fractions) * n_cells).max() <= 1


def test_the_seed_decides_and_only_the_seed():
    first = split_cells(100, (0.5, 0.5), random_state=1)
    np.testing.assert_array_equal(first, split_cells(100, (0.5, 0.5), random_state=1))
    assert (first != split_cells(100, (0.5, 0.5), random_state=2)).any()


@given(st.lists(st.integers(0, 12), min_size=20, max_size=120), FRACTIONS, st.integers(0, 5))
def test_groups_stay_whole_and_no_part_is_empty(codes, fractions, seed):
    groups = pd.Series(codes, name="donor").map("d{}".format)
    if groups.nunique() < len(fractions):
        with pytest.raises(ValueError, match=naming("'donor'", len(fractions), f"got {groups.nunique()}")):
            split_cells(len(groups), fractions, groups=groups, random_state=seed)
        return
    part = split_cells(len(groups), fractions, groups=groups, random_state=seed)
    assert (pd.Series(part).groupby(groups).nunique() == 1).all()
    assert set(part) == set(range(len(fractions)))


def test_groups_meet_the_shares_as_closely_as_they_can():
    groups = pd.Series(np.repeat([f"d{i}" for i in range(20)], 5))
    counts = np.bincount(split_cells(100, (0.8, 0.2), groups=groups))
    assert counts.tolist() == [80, 20]


@given(st.integers(0, 5))
def test_every_label_is_split_alike_and_missing_ones_are_one_more(seed):
    labels = pd.Series(["a"] * 50 + ["b"] * 20 + [None] * 30)
    part = split_cells(100, (0.8, 0.2), stratify=labels, random_state=seed)
    assert [np.bincount(part[rows]).tolist() for rows in (labels == "a", labels == "b", labels.isna())] == [
        [40, 10], [16, 4], [24, 6],
    ]  # fmt: skip


@pytest.mark.parametrize("fractions", [(1.0,), (0.5, 0.6), (1.2, -0.2), (0.25,) * 4])
def test_fractions_that_are_none_are_an_error(fractions):
    with pytest.raises(ValueError, match=naming("fractions", f"got {fractions}")):
        split_cells(10, fractions)


@pytest.mark.parametrize("fractions", [(0.9, 0.1), (0.8, 0.1, 0.1), (0.7, 0.1, 0.2), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (1, 2), (2, 1, 3)])
def test_parts_have_their_size_where_every_label_is_rare(fractions, sizes):
    labels = pd.Series(np.repeat(np.arange(60), np.resize(sizes, 60)))
    part = split_cells(len(labels), fractions, stratify=labels)
    assert np.abs(np.bincount(part) - np.array(fractions) * len(labels)).max() <= 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), FRACTIONS, st.integers(0, 5))
def test_every_label_is_trained_on(sizes, fractions, seed):
    labels = pd.Series(np.repeat(np.arange(len(sizes) + 1), [*sizes, 40]))
    part = split_cells(len(labels), fractions, stratify=labels, random_state=seed)
    assert set(labels[part == 0]) == set(labels)
    assert np.abs(np.bincount(part, minlength=len(fractions)) - np.array(fractions) * len(labels)).max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_the_only_cell_of_a_label_is_not_held_out(seed):
    labels = pd.Series(["a"] * 14 + ["b"])
    part = split_cells(15, (0.9, 0.1), stratify=labels, random_state=seed)
    assert part[14] == 0
    assert (part == 1).sum() == 2


def test_shares_that_are_no_numbers_are_an_error():
    with pytest.raises(ValueError, match=naming("fractions", "got (0.8, nan)")):
        split_cells(10, (0.8, float("nan")))
