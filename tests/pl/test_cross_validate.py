"""Points, curves and numbers are those computed from what is stored."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from messages import naming
from sklearn.metrics import roc_auc_score

from scllm import metrics
from scllm._results import record, record_classes
from scllm.pl import calibration, cv_scores, roc

CLASSES = np.array(["CD4+/x", "B", "NK"], dtype=object)


@pytest.fixture
def cells() -> AnnData:
    """300 cells as `cross_validate` leaves them, of two folds, the baseline worse than the model."""
    rng = np.random.default_rng(0)
    truth = rng.choice(3, 300, p=[0.5, 0.3, 0.2])
    adata = AnnData(np.zeros((300, 1), np.float32))
    adata.obs["type"] = pd.Categorical(CLASSES[truth])
    for name, signal in (("type_cv", 1.5), ("type_cv_baseline", 0.3)):
        odds = rng.gamma(1.0, size=(300, 3))
        odds[np.arange(300), truth] += signal
        probabilities = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
        adata.obs[name] = pd.Categorical.from_codes(probabilities.argmax(axis=1), categories=CLASSES)
        adata.obsm[name + "_probabilities"] = probabilities
    adata.obs["type_cv_fold"] = pd.Categorical(np.where(np.arange(300) < 120, "0", "1"))
    # a cell without a label has no prediction either
    adata.obs.iloc[7, adata.obs.columns.get_loc("type")] = np.nan
    for name in ("type_cv", "type_cv_baseline"):
        adata.obsm[name + "_probabilities"][7] = np.nan
    rows = [
        {"method": method, "repeat": 0, "fold": fold, "metric": metric, "class": None, "n_cells": 5, "value": value}
        for method, values in {"model": [0.7, 0.9], "baseline": [0.6, 0.5]}.items()
        for fold, value in enumerate(values)
        for metric in ("accuracy", "ece")
    ]
    rows.append(rows[0] | {"metric": "f1", "class": "B", "value": 0.1})
    record(adata, "cross_validate", {"key": "type"}, pd.DataFrame(rows), classes=CLASSES)
    for name in ("type_cv", "type_cv_baseline"):
        record_classes(adata, name, CLASSES)
    return adata


def labels(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_points_are_folds_and_bars_their_means(cells) -> None:
    ax = cv_scores(cells, show=False)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["accuracy", "calibration\nerror ↓"]
    points = [collection.get_offsets()[:, 1].tolist() for collection in ax.collections if len(collection.get_offsets())]
    assert points[:2] == [[0.7, 0.9], [0.6, 0.5]]
    assert sorted(text.get_text() for text in ax.texts) == ["0.55", "0.55", "0.80", "0.80"]
    joins = [line.get_ydata().tolist() for line in ax.lines if line.get_ydata()[0] != line.get_ydata()[1]]
    assert joins[:2] == [[0.7, 0.6], [0.9, 0.5]]
    assert labels(ax) == ["fine-tuned", "baseline"]


def test_the_returned_table_is_drawn_and_metrics_are_chosen(cells) -> None:
    table = pd.DataFrame(
        {"r2": [0.5, 0.6], "mae": [3.0, 2.0]},
        index=pd.MultiIndex.from_tuples([("model", 0, 0), ("model", 0, 1)], names=["method", "repeat", "fold"]),
    )
    axes = cv_scores(table, show=False)
    assert [ax.get_xticklabels()[0].get_text() for ax in axes] == ["R²", "mean absolute\nerror ↓"]
    assert [ax.get_ylim()[0] for ax in axes] == pytest.approx([0.45, 0])  # errors begin at zero
    assert cv_scores(table, metrics=["r2"], show=False).get_ylim()[1] == pytest.approx(1.02)
    table["r2"] = 1.0
    assert cv_scores(table, metrics=["r2"], show=False).get_ylim()[0] == pytest.approx(0.978)  # not without a height
    with pytest.raises(KeyError, match="'rr' is not a metric of the table"):
        cv_scores(table, metrics=["rr"], show=False)
    with pytest.raises(ValueError, match=naming("[None]", "method", "repeat", "fold")):
        cv_scores(table.reset_index(drop=True), show=False)


def test_reliability_is_that_of_the_labelled_cells(cells) -> None:
    ax = calibration(cells, truth="type", show=False)
    there = cells.obs["type"].notna().to_numpy()
    truth = cells.obs["type"].astype(object).to_numpy()[there]
    points = [collection.get_offsets() for collection in ax.collections]
    for name, line, text, at in zip(("type_cv", "type_cv_baseline"), ax.lines[1:], labels(ax), points, strict=True):
        probabilities = cells.obsm[name + "_probabilities"][there]
        bins = metrics.reliability(truth, probabilities, CLASSES)
        np.testing.assert_allclose(line.get_ydata(), bins["accuracy"][bins["n_cells"] >= 5])
        np.testing.assert_allclose(at, bins[["confidence", "accuracy"]])
        error = metrics.expected_calibration_error(truth, probabilities, CLASSES)
        assert text.endswith(f"(ECE {error:.3f})")


def test_a_curve_is_the_mean_of_the_folds_and_the_area_that_of_scikit_learn(cells) -> None:
    ax = roc(cells, truth="type", show=False)
    there = cells.obs["type"].notna().to_numpy()
    areas = []
    for fold in ("0", "1"):
        rows = there & (cells.obs["type_cv_fold"] == fold).to_numpy()
        truth, found = cells.obs["type"].astype(object)[rows], cells.obsm["type_cv_probabilities"][rows]
        areas.append(np.mean([roc_auc_score(truth == name, found[:, k]) for k, name in enumerate(CLASSES)]))
    assert labels(ax)[0] == f"fine-tuned  (AUROC {np.mean(areas):.3f} ± {np.std(areas, ddof=1):.3f})"
    # the diagonal, then two folds and the mean of each method
    first, second, mean = (line.get_ydata() for line in ax.lines[1:4])
    np.testing.assert_allclose(mean, (first + second) / 2)
    assert len(ax.lines) == 7
    x, y = ax.lines[3].get_data()
    assert np.trapezoid(y, x) == pytest.approx(np.mean(areas), abs=0.01)


def test_labels_of_other_verbs_are_drawn_with_the_classes_they_recorded(cells) -> None:
    cells.obs["mine"] = cells.obs["type_cv"].astype(str)
    cells.obsm["mine_probabilities"] = cells.obsm["type_cv_probabilities"]
    record_classes(cells, "mine", CLASSES)
    cut = cells[cells.obs["type_cv"] != "NK"].copy()  # cutting drops categories, columns stay
    ax = roc(cut, truth="type", predicted=["mine", "type_cv_baseline"], show=False)
    assert labels(ax)[0].startswith("mine  (AUROC ")
    assert len(ax.lines) == 1 + 1 + 3  # no folds of `mine`
    cells.obs["yours"] = "B"
    cells.obsm["yours_probabilities"] = cells.obsm["mine_probabilities"]
    with pytest.raises(ValueError, match=naming("obsm['yours_probabilities']", 3, "obs['yours']")):
        roc(cells, truth="type", predicted="yours", show=False)
    cells.obsm["mine_probabilities"] = cells.obsm["mine_probabilities"][:, :2]
    with pytest.raises(ValueError, match=naming("obsm['mine_probabilities']", 2, 3)):
        roc(cells, truth="type", predicted="mine", show=False)


@pytest.mark.parametrize("plot", [calibration, roc])
def test_predictions_of_something_else_are_an_error(cells, plot) -> None:
    cells.obs["donor"] = np.where(np.arange(300) % 2, "d1", "d2")
    with pytest.raises(ValueError, match=naming("obs['donor']", "'d2', 'd1'", "'type_cv'")):
        plot(cells, truth="donor", predicted="type_cv", show=False)
    with pytest.raises(ValueError, match=naming("predicted", "empty")):
        plot(cells, truth="type", predicted=[], show=False)


@pytest.mark.parametrize("plot", [calibration, roc])
def test_predictions_of_two_models_under_the_names_of_one_are_an_error(cells, plot) -> None:
    other = cells.copy()
    other.obs["type_cv"] = other.obs["type_cv"].cat.rename_categories({"B": "Monocyte"})
    joined = ad.concat([cells, other], index_unique="-", uns_merge="first")
    with pytest.raises(ValueError, match=naming("obs['type_cv']", "'Monocyte'", "'CD4+/x'")):
        plot(joined, truth="type", show=False)
    cells.obs["type_cv"] = np.where(np.arange(300) < 9, "unknown", cells.obs["type_cv"])  # as a threshold leaves it
    plot(cells, truth="type", show=False)


def test_cells_without_probabilities_are_warned_of(cells) -> None:
    cells.obsm["type_cv_probabilities"][20:30] = np.nan
    with pytest.warns(UserWarning, match=naming(10, 299, "obs['type']", "obsm['type_cv_probabilities']")):
        roc(cells, truth="type", predicted="type_cv", show=False)


@pytest.mark.parametrize("n_bins", [0, -1, 2.5, True])
def test_bins_are_counted(cells, n_bins) -> None:
    with pytest.raises(ValueError, match=naming("n_bins", n_bins)):
        calibration(cells, truth="type", n_bins=n_bins, show=False)


@pytest.mark.parametrize("plot", [calibration, roc])
def test_what_is_missing_is_named(cells, plot) -> None:
    with pytest.raises(KeyError, match=naming("'typ'", "Did you mean 'type'")):
        plot(cells, truth="typ", show=False)
    with pytest.raises(KeyError, match=naming("'none'", "'type_cv', 'type_cv_baseline'")):
        plot(cells, truth="type", predicted="none", show=False)
    with pytest.raises(KeyError, match=naming("'type_c'", "Did you mean 'type_cv'")):
        plot(cells, truth="type", predicted="type_c", show=False)
    lines = [
        plot(cells, truth="type", predicted=name, show=False).lines for name in ("type_cv", "type_cv_probabilities")
    ]
    np.testing.assert_array_equal(*([line.get_xydata() for line in drawn][-1] for drawn in lines))
    cells.obs["other"] = "x"
    with pytest.raises(KeyError, match=naming("key='other'", "predicted=: 'type_cv'")):
        plot(cells, truth="other", show=False)
    cells.obs["type"] = pd.Categorical([None] * 300, categories=["B"])
    with pytest.raises(ValueError, match=naming("obs['type']", "obsm['type_cv_probabilities']")):
        plot(cells, truth="type", show=False)


def test_scores_need_a_cross_validation() -> None:
    with pytest.raises(KeyError, match=r"'cross_validate' is not in adata\.uns"):
        cv_scores(AnnData(np.zeros((2, 1), np.float32)), show=False)


def test_one_metric_may_be_named_alone(cells) -> None:
    ax = cv_scores(cells, metrics="accuracy", show=False)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["accuracy"]
