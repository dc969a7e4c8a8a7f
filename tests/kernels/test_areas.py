from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from scllm.kernels.areas import Ranking, _ranking_areas


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 6))
def test_areas_of_weighted_cells_are_those_of_scikit_learn(seed, n_cells, n_scores):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, n_scores, n_cells) / n_scores  # many of them equal
    is_class = rng.random(n_cells) < 0.5
    weights = rng.integers(0, 4, (3, n_cells))
    found = Ranking(score, is_class).areas(weights)
    for row, (auroc, average_precision) in zip(weights, found.T, strict=True):
        if not row[is_class].any() or not row[~is_class].any():
            assert np.isnan([auroc, average_precision]).all()
            continue
        assert auroc == pytest.approx(roc_auc_score(is_class, score, sample_weight=row), abs=1e-12)
        expected = average_precision_score(is_class, score, sample_weight=row)
        assert average_precision == pytest.approx(expected, abs=1e-12)


def test_compiled_areas_are_those_of_the_interpreter():
    rng = np.random.default_rng(0)
    score, is_class = rng.integers(0, 9, 50) / 9, rng.random(50) < 0.3
    weights = rng.integers(0, 4, (5, 50))
    ranking = Ranking(score, is_class)
    slow = np.empty((2, 5))
    given_to_kernel = ranking._order, ranking._is_last_of_ties, ranking._is_class, weights
    _ranking_areas.py_func(*given_to_kernel, slow[0], slow[1])
    np.testing.assert_array_equal(ranking.areas(weights), slow)
