"""Plots of perturbations and networks show the values of the tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from messages import naming
from scipy import sparse

from scllm import _results, pl


@pytest.fixture
def perturbed(adata):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "perturbation": ["STAT1", "IRF7", *(f"null_{i}" for i in range(20))],
            "is_null": [False, False, *[True] * 20],
            "group": "A",
            "state": "B",
            "goal_shift": [0.3, -0.01, *rng.normal(0, 0.02, 20)],
            "low": 0.0,
            "high": 0.1,
            "p_value": [1e-4, 0.5, *[0.5] * 20],
            "q_value": [2e-4, 0.5, *[np.nan] * 20],
        }
    )
    _results.record(adata, "perturb", {"mode": "delete", "shown": "STAT1"}, table)
    adata.obsm["X_umap"] = rng.normal(size=(adata.n_obs, 2))
    adata.obsm["X_scllm_perturb_before"] = adata.obsm["X_umap"].copy()
    adata.obsm["X_scllm_perturb"] = adata.obsm["X_umap"] + [1.0, 0.0]
    return adata


def test_volcano_names_the_genes_and_shows_the_p_values(perturbed):
    ax = pl.perturbation(perturbed, show=False)
    points = {part.get_label(): np.asarray(part.get_offsets()) for part in ax.collections}
    np.testing.assert_allclose(points["significant (FDR 5%)"], [[0.3, 4.0]])
    assert len(points["null genes"]) == 20
    assert [text.get_text() for text in ax.texts] == ["STAT1", "IRF7"]
    assert "towards B" in ax.get_xlabel()


def test_ranked_shifts_are_in_order(perturbed):
    ax = pl.perturbation(perturbed, kind="ranked", show=False)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["STAT1", "IRF7"]


def test_field_points_where_cells_move(perturbed):
    ax = pl.perturbation(perturbed, kind="field", show=False)
    (arrows,) = [part for part in ax.collections if hasattr(part, "U")]
    assert np.mean(arrows.U) > 0.2 > abs(np.mean(arrows.V))
    assert "STAT1" in ax.get_title()


def test_changes_are_drawn_against_the_measured_ones(adata):
    changes = pd.DataFrame({"perturbation": "STAT1", "gene": list("abcd"), "change": [0.0, 1, 2, 3]})
    _results.record(adata, "predict_perturbation", {}, changes=changes)
    with pytest.raises(KeyError, match=naming("'measured'", "truth")):
        pl.perturbation(adata, kind="change", show=False)
    _results.record(adata, "predict_perturbation", {}, changes=changes.assign(measured=[0.0, 2, 4, 6]))
    ax = pl.perturbation(adata, kind="change", show=False)
    assert ax.get_title() == "STAT1: correlation 1.00"


def test_table_shows_the_model_first_and_the_replicate_last(adata):
    rows = [
        ("all", method, metric, score, scaled, 5, 0)
        for metric, scores in {"pearson": (0.6, 0.5, 0.9), "mse": (0.1, 0.2, 0.05)}.items()
        for method, score, scaled in zip(("mean", "model", "replicate"), scores, (0.0, 0.25, 1.0), strict=True)
    ]
    columns = ["among", "method", "metric", "score", "scaled", "n", "n_unscaled"]
    _results.record(adata, "perturbation", {}, summary=pd.DataFrame(rows, columns=columns))
    ax = pl.perturbation_table(adata, show=False)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["model", "mean", "replicate"]
    assert {"0.60", "0.20"} <= {text.get_text() for text in ax.texts}
    with pytest.raises(KeyError, match=naming("'measured'")):
        pl.perturbation_table(adata, among="measured", show=False)


@pytest.fixture
def network(adata):
    table = pd.DataFrame(
        {"source": ["a", "a", "b"], "target": ["b", "c", "c"], "weight": [1.0, -2.0, 0.5], "group": "all"}
    )
    _results.record(adata, "grn", {"method": "attention"}, table)
    adata.varp["grn"] = sparse.csr_matrix((adata.n_vars, adata.n_vars))
    return adata


def test_network_draws_one_arrow_an_edge(network):
    ax = pl.grn(network, show=False)
    assert sorted(text.get_text() for text in ax.texts) == ["", "", "", "a", "b", "c"]
    ax = pl.grn(network, kind="heatmap", show=False)
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown.filled(0), [[1.0, -2.0], [0, 0.5]])
    with pytest.raises(KeyError, match=naming("'z'")):
        pl.grn(network, genes=["z"], show=False)


def test_attention_shows_the_targets_of_a_gene(network):
    ax = pl.attention(network, gene="a", show=False)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["c", "b"]
    with pytest.raises(KeyError, match=naming("'c'")):
        pl.attention(network, gene="c", show=False)


def test_plots_ask_for_the_verb_that_comes_first(adata):
    for plot, verb in (
        (pl.perturbation, "perturb"),
        (pl.perturbation_table, "fit_perturbation"),
        (pl.grn, "infer_grn"),
    ):
        with pytest.raises(KeyError, match=verb):
            plot(adata, show=False)
