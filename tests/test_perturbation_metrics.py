"""Scores of predicted changes and networks, against an independent judge and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from scllm import metrics
from scllm.metrics import MeasuredChange


def measured(change, error=0.01):
    return MeasuredChange(change, change / error, np.full(change.shape, 100.0))


@pytest.fixture
def drawn():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(6, 40))
    return truth, truth + rng.normal(size=truth.shape)


def of_cell_eval(change, genes):
    names = np.array([*genes[: len(change)], "control"])
    return names, np.vstack([change, np.zeros(change.shape[1])])


def test_parity_with_cell_eval2(drawn):
    metric = pytest.importorskip("cell_eval2.metrics")
    truth, predicted = drawn
    genes = np.array([f"g{i}" for i in range(truth.shape[1])])
    nothing = np.zeros(truth.shape, bool)
    bulks = {"pred_bulk": of_cell_eval(predicted, genes), "real_bulk": of_cell_eval(truth, genes)}
    found = metrics.perturbation_scores(predicted, measured(truth), nothing)
    for name, theirs in (("pearson", metric.pearson_delta), ("mse", metric.mse_delta)):
        expected = theirs(**bulks, control="control")
        np.testing.assert_allclose(found[name], [expected[gene] for gene in genes[:6]], rtol=1e-12)
    own = np.eye(6, 40, dtype=bool)
    for guess in (predicted, np.repeat(predicted[:1], 6, axis=0), np.zeros_like(predicted)):
        expected = metric.discrimination_score(
            pred_bulk=of_cell_eval(guess, genes), real_bulk=bulks["real_bulk"], control="control", distance="cosine",
            rank_denominator="n-1", genes=genes,
        )  # fmt: skip
        np.testing.assert_allclose(
            metrics.discrimination(guess, truth, own), [expected[gene] for gene in genes[:6]], rtol=1e-12
        )


def test_perfect_and_opposite_predictions(drawn):
    truth, _ = drawn
    nothing = np.zeros(truth.shape, bool)
    best = metrics.perturbation_scores(truth, measured(truth), nothing)
    worst = metrics.perturbation_scores(-truth, measured(truth), nothing)
    for name in metrics.PERTURBATION_METRICS:
        assert best[name] == pytest.approx(0.0 if name in metrics.LOWER_IS_BETTER else 1.0)
    assert worst["pearson"] == pytest.approx(-1)
    assert worst["direction"] == pytest.approx(0)
    assert worst["lfc_error"] == pytest.approx(2)
    assert worst["overlap"] == pytest.approx(1)  # says nothing about signs


def test_perturbed_genes_are_not_scored(drawn):
    truth, _ = drawn
    own = np.eye(6, 40, dtype=bool)
    predicted = np.where(own, 1e6, truth)
    found = metrics.perturbation_scores(predicted, measured(truth), own)
    assert found["pearson"] == pytest.approx(1)
    assert found["discrimination"] == pytest.approx(1)


def test_weighted_error_counts_significant_genes_most():
    truth = np.array([[1.0, 0.0, 0.0, 0.0]])
    change = MeasuredChange(truth, np.array([[10.0, 1.0, 0.0, 0.0]]), np.full((1, 4), 50.0))
    predicted = np.array([[0.0, 1.0, 0.0, 0.0]])
    found = metrics.perturbation_scores(predicted, change, np.zeros((1, 4), bool))
    assert found["weighted_mse"][0] == pytest.approx((100 * 1 + 1 * 1) / 101)
    assert np.isnan(found["discrimination"][0])  # one perturbation has no others


def test_no_prediction_has_no_score(drawn):
    truth, predicted = drawn
    predicted = predicted.copy()
    predicted[2] = np.nan
    found = metrics.perturbation_scores(predicted, measured(truth), np.zeros(truth.shape, bool))
    assert all(np.isnan(found[name][2]) and np.isfinite(found[name][1]) for name in metrics.PERTURBATION_METRICS)


def test_edges_of_a_known_response_are_found_with_directions_and_signs():
    rng = np.random.default_rng(0)
    m, edges = 60, {}
    effect = rng.normal(0, 0.01, (m, m))
    while len(edges) < 20:
        a, b = (int(i) for i in rng.integers(0, m, 2))
        if a != b and (b, a) not in edges and (a, b) not in edges:
            edges[a, b] = int(rng.choice([-1, 1]))
            effect[a, b] = -edges[a, b]  # without an activator, the target falls
    found = metrics.directed_edges(effect, rng.normal(size=m), fdr=0.01)
    found = found[found["is_edge"]]
    assert dict(zip(zip(found["source"], found["target"], strict=True), found["sign"], strict=True)) == edges


def test_a_pair_that_acts_both_ways_has_both_edges():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.01, (40, 40))
    effect[1, 2], effect[2, 1] = -1.0, 1.0
    found = metrics.directed_edges(effect, np.zeros(40)).set_index(["source", "target"])
    assert (found.loc[(1, 2), "sign"], found.loc[(2, 1), "sign"]) == (1, -1)
    assert found.loc[[(1, 2), (2, 1)], "is_edge"].all()


def test_of_two_directions_the_much_weaker_one_is_no_edge():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.01, (120, 120))
    effect[0], effect[:, 0] = np.nan, np.nan  # never seen
    effect[1, 2], effect[2, 1] = -3.0, -1.0
    found = metrics.directed_edges(effect, np.zeros(120)).set_index(["source", "target"])
    assert (found.loc[[(1, 2), (2, 1)], "q_value"] < 0.05).all()
    assert found.loc[[(1, 2), (2, 1)], "is_edge"].tolist() == [True, False]


def test_null_effects_give_few_edges():
    rng = np.random.default_rng(0)
    n_false = sum(
        metrics.directed_edges(rng.normal(size=(30, 30)), rng.normal(size=30))["is_edge"].any() for _ in range(30)
    )
    assert n_false <= stats.binom.ppf(0.99, 30, 0.05)


def effects_of_unequal_genes(seed, m=60):
    """Noise of which some sources have up to a hundred times as much as others, and some targets too."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=(m, 1))) * np.exp(rng.normal(size=m))
    return rng.normal(size=(m, m)) * spread, spread, rng


def test_edges_are_found_among_sources_and_targets_of_unequal_spread():
    effect, spread, rng = effects_of_unequal_genes(0)
    edges = {(int(a), int((a + 1) % 60)): int(rng.choice([-1, 1])) for a in range(0, 60, 3)}
    for (a, b), sign in edges.items():
        effect[a, b] = -40 * sign * spread[a, b]
    found = metrics.directed_edges(effect, rng.normal(size=60))
    found = found[found["is_edge"]].set_index(["source", "target"])["sign"].to_dict()
    hits = set(found) & set(edges)
    assert len(hits) >= 18
    assert len(set(found) - set(edges)) <= 3
    assert all(found[pair] == edges[pair] for pair in hits)


def test_a_source_that_acts_on_nearly_half_of_the_genes_keeps_its_edges():
    rng = np.random.default_rng(0)
    effect = rng.normal(0, 0.01, (60, 60))
    effect[5, 10:35] = -1.0
    found = metrics.directed_edges(effect, rng.normal(size=60))
    assert found.loc[found["source"] == 5, "is_edge"].sum() == 25


def test_sources_of_unequal_spread_alone_give_no_edges():
    n_false = sum(
        metrics.directed_edges(effects_of_unequal_genes(seed)[0], np.zeros(60))["is_edge"].any() for seed in range(30)
    )
    assert n_false <= stats.binom.ppf(0.99, 30, 0.05)


def test_edge_scores_of_perfect_and_equal_strengths():
    is_edge = np.zeros((5, 5), bool)
    is_edge[0, 1:3] = True
    among = np.zeros((5, 5), bool)
    among[0] = True
    among[0, 0] = False
    best = metrics.edge_scores(np.where(is_edge, 2.0, 1.0), is_edge, among)
    assert best == {
        "auroc": 1.0, "auprc": 1.0, "auprc_ratio": 2.0, "early_precision": 1.0, "early_precision_ratio": 2.0,
    }  # fmt: skip
    equal = metrics.edge_scores(np.ones((5, 5)), is_edge, among)
    assert (equal["auroc"], equal["early_precision"]) == (0.5, 0.5)


def test_matched_null_finds_outliers_and_removes_the_trend_with_expression():
    rng = np.random.default_rng(0)
    level = np.linspace(0, 5, 200)
    statistic = 0.3 * level + rng.normal(0, 0.1 + 0.1 * level)
    statistic[[20, 150]] += [8, 20]
    found = metrics.matched_null_test(statistic, level)
    assert set(np.flatnonzero(found["q_value"] < 0.05)) == {20, 150}
    separate = metrics.matched_null_test(statistic, level, ~np.isin(np.arange(200), [20, 100, 150]))
    assert separate["q_value"].notna().sum() == 3
    assert set(np.flatnonzero(separate["q_value"] < 0.05)) == {20, 150}
    few = metrics.matched_null_test(np.arange(5.0), np.arange(5.0))
    assert few["p_value"].isna().all()


def drawn_nulls(rng, noise, n):
    """A statistic without effects, that rises with the level, and the spread of which may rise too."""
    level = rng.gamma(2, 0.7, n)
    spread = np.exp(level - 1) if noise == "unequal" else np.ones(n)
    shape = {"heavy": lambda: rng.standard_t(3, n), "skewed": lambda: rng.lognormal(size=n)}
    draws = shape.get(noise, lambda: rng.normal(size=n))()
    return 0.5 * level + spread * draws, level, spread


@pytest.mark.parametrize(
    ("noise", "alternative"),
    [("normal", "two-sided"), ("heavy", "two-sided"), ("unequal", "two-sided"), ("skewed", "greater")],
)
@pytest.mark.parametrize("are_separate", [True, False])
def test_false_discoveries_of_matched_nulls_are_within_a_binomial_bound(noise, are_separate, alternative):
    rng, n, n_calls = np.random.default_rng(0), 120 if are_separate else 200, 25
    n_calls_with_false, n_found, n_false, n_missed = 0, 0, 0, 0
    for _ in range(n_calls):
        statistic, level, spread = drawn_nulls(rng, noise, n)
        is_null = np.ones(n, bool)
        is_null[rng.choice(n, 20, replace=False)] = False
        nulls = is_null if are_separate else None
        found = metrics.matched_null_test(statistic, level, nulls, alternative=alternative)["q_value"] < 0.05
        n_calls_with_false += bool(found.any())
        real = np.flatnonzero(~is_null)[:5]
        statistic[real] += 20 * spread[real]
        found = metrics.matched_null_test(statistic, level, nulls, alternative=alternative)["q_value"] < 0.05
        n_found += int(found.sum())
        n_false += int(found.sum() - found[real].sum())
        n_missed += int(5 - found[real].sum())
    assert n_calls_with_false <= stats.binom.ppf(0.99, n_calls, 0.05)
    assert n_false <= stats.binom.ppf(0.99, n_found, 0.05)
    if noise in ("normal", "unequal"):
        assert n_missed < 0.1 * 5 * n_calls
