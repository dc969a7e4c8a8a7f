"""Folds: each cell in one fold, whole groups, and the same share of each label."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from scllm.tl._folds import fold_cells


@st.composite
def grouped(draw):
    """Groups of uneven size, labels that may follow them, and a number of folds that the groups allow."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=9))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    n_folds = draw(st.integers(2, len(sizes)))
    n_classes = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 99))
    rng = np.random.default_rng(seed)
    codes = rng.integers(n_classes, size=len(groups))
    if draw(st.booleans()):
        codes = groups % n_classes
    # At least one label has as many cells as there are folds, which the verb requires.
    codes[:n_folds] = 0
    return (codes if draw(st.booleans()) else None), groups, n_folds, seed


@settings(deadline=None, max_examples=150)
@given(grouped())
def test_groups_are_never_split_and_no_fold_is_empty(case) -> None:
    codes, groups, n_folds, seed = case
    fold = fold_cells(len(groups), n_folds, codes=codes, groups=groups, random_state=seed)
    assert set(fold) == set(range(n_folds))
    for group in np.unique(groups):
        assert len(set(fold[groups == group])) == 1
    np.testing.assert_array_equal(fold, fold_cells(len(groups), n_folds, codes=codes, groups=groups, random_state=seed))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=60), st.integers(2, 5), st.integers(0, 99))
def test_every_fold_gets_the_same_share_of_each_label(codes, n_folds, seed) -> None:
    codes = np.array([0] * n_folds + codes)
    fold = fold_cells(len(codes), n_folds, codes=codes, random_state=seed)
    counts = np.array([np.bincount(fold[codes == code], minlength=n_folds) for code in np.unique(codes)])
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()
    assert set(fold) == set(range(n_folds))


def test_folds_equal_those_of_scikit_learn_with_the_same_seed() -> None:
    codes = np.arange(40) % 3
    fold = fold_cells(40, 4, codes=codes, random_state=7)
    for number, (_, tested) in enumerate(StratifiedKFold(4, shuffle=True, random_state=7).split(codes, codes)):
        np.testing.assert_array_equal(np.flatnonzero(fold == number), tested)
    assert (fold != fold_cells(40, 4, codes=codes, random_state=8)).any()


@pytest.mark.parametrize("codes", [None, np.arange(12) % 2])
def test_as_many_folds_as_groups_leave_one_out(codes) -> None:
    groups = np.array([2, 0, 1, 0, 1, 2, 2, 2, 0, 0, 1, 0])
    np.testing.assert_array_equal(fold_cells(12, 3, codes=codes, groups=groups), groups)
