from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scllm.kernels.draws import mix, uniform_entries
from scllm.kernels.thinning import thin, thin_to


def one_cell(counts, key, most):
    """What is left of each gene of one cell, zeros included."""
    counts = np.asarray(counts, np.float32)
    indptr, ids, kept = thin(np.array([0, len(counts)]), np.arange(len(counts)), counts, np.array([key]), most)
    assert indptr.tolist() == [0, len(kept)]
    left = np.zeros(len(counts))
    left[ids] = kept
    return left


@pytest.mark.parametrize("n", [1, 5, 32, 33, 100])
def test_what_is_left_of_a_count_is_binomial(n):
    key = int(mix(0, n))
    p = 1 - 0.9 * uniform_entries(np.array([0, 1]), np.array([0]), np.array([key]), salt=3)[0]
    left = one_cell(np.full(20_000, n), key, 0.9)
    edges = np.unique(stats.binom.ppf(np.linspace(0, 1, 11), n, p))
    expected = 20_000 * np.diff(stats.binom.cdf(edges, n, p))
    seen = np.histogram(left, np.append(edges[:-1] + 0.5, n + 0.5))[0]
    there = expected > 5
    # a chance of one in ten thousand, and the draws are fixed
    assert stats.chisquare(seen[there], expected[there] * seen[there].sum() / expected[there].sum()).pvalue > 1e-4
    assert left.mean() == pytest.approx(n * p, abs=5 * np.sqrt(n * p * (1 - p) / 20_000))
    assert left.var() == pytest.approx(n * p * (1 - p), rel=0.06)


def test_the_share_taken_from_cells_is_uniform_up_to_the_largest():
    n_cells = 2_000
    indptr, ids = np.arange(n_cells + 1), np.zeros(n_cells, np.int64)
    keys = mix(0, np.arange(n_cells))
    _, _, kept = thin(indptr, ids, np.full(n_cells, 10_000.0), keys, 0.6)
    assert stats.kstest(1 - kept / 10_000, "uniform", (0, 0.6)).pvalue > 1e-4


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=30),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(1e-6, 0.999),
)
@settings(deadline=None)
def test_never_more_is_left_than_was_there(counts, key, most):
    left = one_cell(counts, key, most)
    assert (left >= 0).all()
    assert (left <= counts).all()


def test_a_cell_is_thinned_alike_wherever_it_stands():
    rng = np.random.default_rng(0)
    counts, keys = rng.poisson(20, (6, 50)).astype(np.float32), mix(1, np.arange(6))

    def thinned(cells):
        indptr = np.arange(len(cells) + 1) * 50
        indptr, ids, kept = thin(indptr, np.tile(np.arange(50), len(cells)), counts[cells].ravel(), keys[cells], 0.7)
        return [list(zip(ids[a:b], kept[a:b])) for a, b in pairwise(indptr)]

    together = thinned(np.arange(6))
    assert thinned(np.array([4, 1])) == [together[4], together[1]]
    assert together != thinned(np.arange(6)[::-1])


def test_another_key_gives_another_draw():
    counts = np.full(100, 20)
    assert not np.array_equal(one_cell(counts, 1, 0.5), one_cell(counts, 2, 0.5))


def test_empty_rows_stay_empty():
    indptr, ids, kept = thin(np.array([0, 0, 0]), np.empty(0, np.int64), np.empty(0), mix(0, np.arange(2)), 0.5)
    assert (indptr.tolist(), len(ids), len(kept)) == ([0, 0, 0], 0, 0)


def test_a_share_of_nothing_takes_nothing():
    counts = np.array([5.0, 40.0, 7.0])
    assert one_cell(counts, int(mix(0, 1)), 0.0).tolist() == counts.tolist()


def test_cells_are_thinned_to_about_a_total_and_shallower_ones_are_unchanged():
    counts = np.random.default_rng(0).poisson(5, (40, 300)).astype(np.float32)
    indptr, ids = np.arange(41) * 300, np.tile(np.arange(300), 40)
    totals = np.where(np.arange(40) < 20, 500.0, 10_000.0)
    indptr, ids, kept = thin_to(indptr, ids, counts.ravel(), mix(0, np.arange(40)), totals)
    left = np.add.reduceat(kept, indptr[:-1])
    np.testing.assert_array_equal(left[20:], counts[20:].sum(1))
    # five standard deviations of a binomial total of 1,500 counts, each kept with a probability of one third
    assert np.abs(left[:20] - 500).max() < 5 * np.sqrt(1_500 * (1 / 3) * (2 / 3))
    assert (kept > 0).all()
