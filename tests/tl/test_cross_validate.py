"""Cross-validation: out-of-fold predictions, scores, and what is written to the AnnData."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from messages import naming
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score

from scllm import models
from scllm.tl import TrainConfig, classify, cross_validate, finetune, transfer_labels

FAST = {"epochs": 1, "batch_size": 16}


def settings_of(adata) -> dict:
    return adata.uns["scllm"]["cross_validate"]


def test_every_cell_is_predicted_once_by_a_model_that_has_not_seen_it(adata, tiny, tmp_path):
    cross_validate(adata, tiny, key="cell_type", n_folds=3, run_dir=tmp_path, baseline=False, keep_models=True, **FAST)
    fold = adata.obs["cell_type_cv_fold"].astype(int).to_numpy()
    assert np.bincount(fold).tolist() == [20, 20, 20]
    for number in range(3):
        cells = np.load(tmp_path / f"fold-{number}" / "cells.npz")
        assert sorted([*cells["train"], *cells["validation"]]) == np.flatnonzero(fold != number).tolist()
        # These are the predictions of the model of the fold.
        test = adata[fold == number].copy()
        classify(test, tmp_path / f"fold-{number}")
        np.testing.assert_allclose(
            test.obsm["scllm_label_probabilities"], test.obsm["cell_type_cv_probabilities"], atol=1e-5
        )
        assert test.obs["scllm_label"].astype(str).tolist() == test.obs["cell_type_cv"].astype(str).tolist()
    assert adata.obs["cell_type_cv_prob"].tolist() == adata.obsm["cell_type_cv_probabilities"].max(axis=1).tolist()


def test_planted_structure_is_learnt(adata, tiny):
    table = cross_validate(
        adata, tiny, key="cell_type", n_folds=2, epochs=12, lr=5e-3, batch_size=8,
        config=TrainConfig(schedule="constant"),
    )  # fmt: skip
    assert table.loc["model", "accuracy"].mean() > 0.8
    assert table.loc["baseline", "accuracy"].mean() > 0.9
    assert settings_of(adata)["overall"].query("method == 'model' and metric == 'accuracy'")["low"].item() > 0.6


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_shuffled_labels_are_not_learnt(adata, tiny):
    adata.obs["noise"] = np.random.default_rng(0).permutation(adata.obs["cell_type"].astype(str))
    table = cross_validate(adata, tiny, key="noise", n_folds=2, epochs=4, lr=5e-3, batch_size=8)
    assert (table.groupby("method")["accuracy"].mean() < 0.75).all()


def test_scores_equal_those_of_the_written_predictions(adata, tiny):
    table = cross_validate(adata, tiny, key="cell_type", n_folds=3, **FAST)
    assert list(table.index.names) == ["method", "repeat", "fold"]
    assert table.index.tolist() == [(method, 0, fold) for method in ("baseline", "model") for fold in range(3)]
    long = settings_of(adata)["table"]
    for method, column in (("model", "cell_type_cv"), ("baseline", "cell_type_cv_baseline")):
        for fold in range(3):
            cells = adata.obs[adata.obs["cell_type_cv_fold"] == str(fold)]
            truth, predicted = cells["cell_type"].astype(str), cells[column].astype(str)
            assert table.loc[(method, 0, fold), "accuracy"] == pytest.approx(accuracy_score(truth, predicted))
            of_b = long.query("method == @method and fold == @fold and metric == 'f1'").set_index("class").loc["B"]
            assert of_b["value"] == pytest.approx(f1_score(truth, predicted, pos_label="B", zero_division=0))
            assert of_b["n_cells"] == (truth == "B").sum()
    overall = settings_of(adata)["overall"].set_index(["method", "metric"])
    found = accuracy_score(adata.obs["cell_type"].astype(str), adata.obs["cell_type_cv_baseline"].astype(str))
    assert overall.loc[("baseline", "accuracy"), "value"] == pytest.approx(found)
    assert (overall["low"] <= overall["high"]).all()


def test_the_baseline_is_logistic_regression_on_the_same_folds(adata, tiny):
    cross_validate(adata, tiny, key="cell_type", n_folds=3, **FAST)
    counts = adata.X.toarray()
    logged = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    fold = adata.obs["cell_type_cv_fold"].astype(int).to_numpy()
    for number in range(3):
        probe = LogisticRegression(C=0.1, max_iter=1000).fit(
            logged[fold != number], adata.obs["cell_type"][fold != number]
        )
        expected = probe.predict_proba(logged[fold == number])
        found = adata.obsm["cell_type_cv_baseline_probabilities"][fold == number]
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_same_seed_gives_the_same_folds_and_predictions(adata, tiny):
    first, again, other = (adata.copy() for _ in range(3))
    cross_validate(first, tiny, key="cell_type", n_folds=2, random_state=3, **FAST)
    cross_validate(again, tiny, key="cell_type", n_folds=2, config=TrainConfig(random_state=3), **FAST)
    cross_validate(other, tiny, key="cell_type", n_folds=2, random_state=4, baseline=False, **FAST)
    pd.testing.assert_frame_equal(first.obs, again.obs)
    assert (first.obs["cell_type_cv_fold"] != other.obs["cell_type_cv_fold"]).any()
    with pytest.raises(TypeError, match=naming("random_state", "4", "3", "config")):
        cross_validate(adata, tiny, key="cell_type", random_state=4, config=TrainConfig(random_state=3), **FAST)
    with pytest.raises(ValueError, match=naming("random_state", "-1")):
        cross_validate(adata, tiny, key="cell_type", random_state=-1, **FAST)


def test_repeats_use_the_next_seeds_and_the_first_is_written(adata, tiny, tmp_path):
    table = cross_validate(adata, tiny, key="cell_type", n_folds=2, n_repeats=2, run_dir=tmp_path, **FAST)
    assert table.index.tolist() == [(m, r, f) for m in ("baseline", "model") for r in (0, 1) for f in (0, 1)]
    once = adata.copy()
    alone = cross_validate(once, tiny, key="cell_type", n_folds=2, random_state=1, **FAST)
    pd.testing.assert_frame_equal(
        table.xs(1, level="repeat").reset_index(drop=True), alone.xs(0, level="repeat").reset_index(drop=True)
    )
    first = np.load(tmp_path / "fold-0" / "cells.npz")["train"]
    second = np.load(tmp_path / "repeat-1" / "fold-0" / "cells.npz")["train"]
    assert set(first) != set(second)
    assert not set(first) & set(np.flatnonzero(adata.obs["cell_type_cv_fold"] == "0"))


def test_groups_are_tested_whole_and_one_is_left_out_at_a_time(adata, tiny):
    adata.obs["donor"] = np.repeat(["c", "a", "b"], 20)
    cross_validate(adata, tiny, key="cell_type", n_folds=3, group_key="donor", **FAST)
    assert adata.obs["cell_type_cv_fold"].astype(str).tolist() == ["2"] * 20 + ["0"] * 20 + ["1"] * 20
    assert settings_of(adata)["params"]["group_key"] == "donor"


def test_values_are_compared_with_ridge_regression(adata, tiny):
    depth = np.asarray(adata.X[:, 20:26].sum(1)).ravel()
    adata.obs["activity"] = np.where(np.arange(60) < 4, np.nan, np.log1p(depth))
    with pytest.warns(UserWarning, match=naming("4 of 60 cells", "value", "obs['activity']")):
        table = cross_validate(adata, tiny, key="activity", n_folds=3, **FAST)
    assert list(table.columns) == ["r2", "pearson", "mae"]
    assert table.loc["baseline", "r2"].mean() > 0.3
    assert adata.obs["activity_cv"].isna().tolist() == [True] * 4 + [False] * 56
    cells = adata.obs[adata.obs["activity_cv_fold"] == "1"]
    expected = (cells["activity"] - cells["activity_cv_baseline"]).abs().mean()
    assert table.loc[("baseline", 0, 1), "mae"] == pytest.approx(expected, rel=1e-5)
    assert "activity_cv_probabilities" not in adata.obsm
    assert "classes" not in settings_of(adata)


def test_cells_without_a_label_are_ignored_and_get_no_prediction(adata, tiny, tmp_path):
    adata.obs["label"] = adata.obs["cell_type"].astype(object)
    adata.obs.iloc[:6, adata.obs.columns.get_loc("label")] = None
    with pytest.warns(UserWarning, match=naming("6 of 60 cells", "label", "obs['label']")) as warned:
        cross_validate(adata, tiny, key="label", n_folds=2, run_dir=tmp_path, **FAST)
    assert len(warned) == 1
    for column in ("label_cv", "label_cv_prob", "label_cv_fold", "label_cv_baseline"):
        assert adata.obs[column].isna().tolist() == [True] * 6 + [False] * 54
    assert np.isnan(adata.obsm["label_cv_probabilities"][:6]).all()
    cells = np.load(tmp_path / "fold-0" / "cells.npz")
    assert min([*cells["train"], *cells["validation"]]) >= 6


@pytest.mark.parametrize("validation", [0, 0.3])
def test_the_share_for_validation_is_of_the_training_cells(adata, tiny, tmp_path, validation):
    cross_validate(adata, tiny, key="cell_type", n_folds=2, run_dir=tmp_path, validation=validation, **FAST)
    cells = np.load(tmp_path / "fold-0" / "cells.npz")
    assert (len(cells["train"]), len(cells["validation"])) == ((30, 0) if not validation else (21, 9))


def test_the_rest_of_the_data_is_unchanged(adata, tiny):
    adata.layers["counts"], adata.X = adata.X.copy(), adata.X.log1p()
    adata.obs["keep"] = np.arange(60)
    adata.uns["mine"] = {"a": 1}
    before, matrix, layer = adata.copy(), adata.X, adata.layers["counts"]
    cross_validate(adata, tiny, key="cell_type", n_folds=2, layer="counts", **FAST)
    assert adata.X is matrix
    assert adata.layers["counts"] is layer
    assert (adata.X != before.X).nnz == (layer != before.layers["counts"]).nnz == 0
    pd.testing.assert_frame_equal(adata.obs[before.obs.columns], before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert set(adata.obs) - set(before.obs) == {
        f"cell_type_cv{end}" for end in ("", "_prob", "_fold", "_baseline", "_baseline_prob")
    }
    assert set(adata.obsm) == {"cell_type_cv_probabilities", "cell_type_cv_baseline_probabilities"}
    assert set(adata.uns) == {"mine", "scllm"}
    assert set(adata.uns["scllm"]) == {"cross_validate", "probabilities", "model"}
    assert adata.uns["scllm"]["model"]["hash"] == tiny.hash()


def test_the_matrix_is_shared_with_what_is_trained_on(adata):
    from scllm.tl._cross_validate import _Cells
    from scllm.tl._target import find_target

    cells = _Cells.of(adata, find_target(adata.obs, "cell_type"), layer=None, groups=None)
    assert np.shares_memory(cells.adata.X.data, adata.X.data)
    cells.adata.obs["new"] = 1
    assert "new" not in adata.obs


def test_the_only_training_cell_of_a_label_is_trained_on(adata):
    from scllm.tl._cross_validate import _Cells
    from scllm.tl._target import find_target

    adata.obs["label"] = ["rare", *["often"] * 59]
    cells = _Cells.of(adata, find_target(adata.obs, "label"), layer=None, groups=None)
    for seed in range(8):
        parts = cells._parts(np.arange(40), 0.5, seed)
        assert parts[0] == "train"
        assert np.bincount(parts.codes).tolist() == [20, 20, 20]


@pytest.mark.parametrize("key", ["label", "activity"])
def test_results_survive_files(adata, tiny, tmp_path, key):
    adata.obs["label"] = pd.Categorical(np.where(adata.obs["cell_type"] == "A", "CD4+/CD25 T Reg", "B"))
    adata.obs.loc["cell_3", "label"] = np.nan
    adata.obs["activity"] = np.log1p(np.asarray(adata.X[:, 20:26].sum(1)).ravel())
    if key == "label":
        with pytest.warns(UserWarning, match=naming("1 of 60 cells", "label")):
            cross_validate(adata, tiny, key=key, n_folds=2, **FAST)
    else:
        cross_validate(adata, tiny, key=key, n_folds=2, **FAST)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    for back in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        pd.testing.assert_frame_equal(back.obs, adata.obs)
        for name in adata.obsm:
            np.testing.assert_array_equal(back.obsm[name], adata.obsm[name])
        for name in ("table", "overall"):
            pd.testing.assert_frame_equal(
                settings_of(back)[name].reset_index(drop=True), settings_of(adata)[name], check_index_type=False
            )


def test_a_finished_fold_is_not_trained_again(adata, tiny, tmp_path):
    whole = adata.copy()
    expected = cross_validate(whole, tiny, key="cell_type", n_folds=3, run_dir=tmp_path / "whole", **FAST)
    # One fold is finished, and the next was interrupted.
    half = tmp_path / "half"
    half.mkdir()
    os.rename(tmp_path / "whole" / "fold-0", half / "fold-0")
    stamp = (half / "fold-0" / "done").stat().st_mtime_ns
    history = (half / "fold-0" / "history.jsonl").read_text()
    found = cross_validate(adata, tiny, key="cell_type", n_folds=3, run_dir=half, **FAST)
    assert ((half / "fold-0" / "done").stat().st_mtime_ns, (half / "fold-0" / "history.jsonl").read_text()) == (
        stamp, history,
    )  # fmt: skip
    pd.testing.assert_frame_equal(found, expected)
    pd.testing.assert_frame_equal(adata.obs, whole.obs)


WEIGHTS = {"model", "best_model.pt", "last.pt", "checkpoints"}


def test_folds_keep_predictions_and_weights_only_on_request(adata, tiny, tmp_path):
    options = {"key": "cell_type", "n_folds": 2, "baseline": False, **FAST}
    expected = cross_validate(adata, tiny, run_dir=tmp_path / "kept", keep_models=True, **options)
    found = cross_validate(adata.copy(), tiny, run_dir=tmp_path / "run", **options)
    pd.testing.assert_frame_equal(found, expected)
    for number in range(2):
        assert {file.name for file in (tmp_path / "kept" / f"fold-{number}").iterdir()} >= WEIGHTS
        there = {file.name for file in (tmp_path / "run" / f"fold-{number}").iterdir()}
        assert not there & WEIGHTS
        assert there >= {"spec.json", "history.jsonl", "predictions"}
    assert sum(file.stat().st_size for file in (tmp_path / "run").rglob("*")) < 100_000


def test_predictions_of_finished_folds_are_read_again(adata, tiny, tmp_path, monkeypatch):
    options = {"key": "cell_type", "n_folds": 2, "run_dir": tmp_path / "run", **FAST}
    first = cross_validate(adata, tiny, **options)
    monkeypatch.setattr("scllm.tl._cross_validate.finetune", None)  # a call would raise
    again = adata.copy()
    pd.testing.assert_frame_equal(cross_validate(again, tiny, **options), first)
    np.testing.assert_array_equal(again.obsm["cell_type_cv_probabilities"], adata.obsm["cell_type_cv_probabilities"])
    with pytest.raises(ValueError, match=naming(tmp_path / "run" / "fold-0", "keep_models=False")):
        cross_validate(adata, tiny, keep_models=True, **options)
    with pytest.raises(ValueError, match=r"other settings \(config\.epochs|options\.epochs"):
        cross_validate(adata, tiny, **{**options, "epochs": 2})
    changed = adata.copy()
    changed.X = 2 * changed.X
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        cross_validate(changed, tiny, **options)


KILLED = """
import sys
import anndata, torch
from scllm import models, tl
torch.set_num_threads(1)
adata = anndata.read_h5ad(sys.argv[1])
options = {"key": "cell_type", "n_folds": 3, "epochs": 12, "batch_size": 4}
tl.cross_validate(adata, sys.argv[2], run_dir=sys.argv[3], **options)
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed(adata, tiny, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    tiny.save(tmp_path / "model")
    run = tmp_path / "run"
    call = [sys.executable, "-c", KILLED, str(tmp_path / "a.h5ad"), str(tmp_path / "model"), str(run)]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (run / "fold-1" / "last.pt").exists() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / "fold-0" / "done").exists()
    assert not (run / "fold-2" / "done").exists()
    stamp = (run / "fold-0" / "done").stat().st_mtime_ns
    options = {"key": "cell_type", "n_folds": 3, "epochs": 12, "batch_size": 4}
    found = cross_validate(adata, tmp_path / "model", run_dir=run, **options)
    assert (run / "fold-0" / "done").stat().st_mtime_ns == stamp
    whole = adata.copy()
    expected = cross_validate(whole, tmp_path / "model", **options)
    # The killed process may have used another number of threads, which changes the last digits of probabilities;
    # ece sorts them into bins, so that a cell at the edge of one may move.
    probabilities = "cell_type_cv_probabilities"
    np.testing.assert_allclose(adata.obsm[probabilities], whole.obsm[probabilities], atol=1e-4)
    pd.testing.assert_frame_equal(found.drop(columns="ece"), expected.drop(columns="ece"), rtol=1e-3)


def test_resume_is_checked_against_existing_folds(adata, tiny, tmp_path):
    with pytest.raises(ValueError, match=naming("resume", "'yes'", "'auto'", True, False)):
        cross_validate(adata, tiny, key="cell_type", n_folds=2, resume="yes", **FAST)
    with pytest.raises(ValueError, match=naming("run_dir=", "resume=True", None)):
        cross_validate(adata, tiny, key="cell_type", n_folds=2, resume=True, **FAST)
    with pytest.raises(ValueError, match=naming(tmp_path, "folds", "resume=True", "resume='auto'")):
        cross_validate(adata, tiny, key="cell_type", n_folds=2, run_dir=tmp_path, resume=True, **FAST)
    cross_validate(adata, tiny, key="cell_type", n_folds=2, run_dir=tmp_path, resume=False, **FAST)
    cross_validate(adata, tiny, key="cell_type", n_folds=2, run_dir=tmp_path, resume=True, **FAST)
    with pytest.raises(ValueError, match=naming(tmp_path, "folds", "resume=False", "empty")):
        cross_validate(adata, tiny, key="cell_type", n_folds=2, run_dir=tmp_path, resume=False, **FAST)
    with pytest.raises(ValueError, match=naming(tmp_path, "data.cells")):
        cross_validate(adata, tiny, key="cell_type", n_folds=2, run_dir=tmp_path, random_state=1, **FAST)


BAD = {
    "missing column": (
        {"key": "celltype"}, KeyError, r"'celltype' is not a column of adata\.obs\. Did you mean 'cell_type'\?",
    ),
    "several columns": ({"key": ["cell_type", "batch"]}, TypeError, naming("key", "['cell_type', 'batch']")),
    "constant": ({"key": "constant"}, ValueError, r"2 classes in obs\['constant'\], got 1 \('x'\)"),
    "constant value": ({"key": "flat"}, ValueError, naming("obs['flat']", 2, "distinct values", 1)),
    "one cell a label": (
        {"key": "names"}, ValueError, naming("n_folds=5", "all 60 labels of obs['names']", "key="),
    ),
    "numbers as text": (
        {"key": "text"}, ValueError, naming("n_folds=5", "all 60 labels of obs['text']", ".astype(float)"),
    ),
    "integers": ({"key": "n"}, ValueError, naming("obs['n']", "integers", "first: 0", ".astype('category')")),
    "no label": ({"key": "nothing"}, ValueError, naming("obs['nothing']", "all 60 cells")),
    "few groups": (
        {"key": "cell_type", "group_key": "batch"}, ValueError,
        naming("obs['batch']", "n_folds=5", "got 2", "n_folds=2 to leave one group out"),
    ),
    "one group": (
        {"key": "cell_type", "group_key": "constant"}, ValueError,
        naming("obs['constant']", "n_folds=5", "got 1", "another group_key"),
    ),
    "no group": (
        {"key": "cell_type", "group_key": "gaps", "n_folds": 2}, ValueError,
        naming("1 cells", "group", "obs['gaps']", "first: 'cell_0'"),
    ),
    "missing group": ({"key": "cell_type", "group_key": "donor"}, KeyError, r"'donor' is not a column of adata\.obs"),
    "groups that are the labels": (
        {"key": "cell_type", "group_key": "cell_type", "n_folds": 2}, ValueError,
        naming("2 labels of obs['cell_type']", "fold 0", "another group_key"),
    ),
    "one fold": ({"key": "cell_type", "n_folds": 1}, ValueError, naming("n_folds=1", "n_repeats=1", 2)),
    "unknown option": ({"key": "cell_type", "epoch": 3}, TypeError, r"'epoch'.*Did you mean 'epochs'\?"),
    "misspelt option of its own": ({"key": "cell_type", "n_fold": 3}, TypeError, r"Did you mean 'n_folds'\?"),
    "split column": ({"key": "cell_type", "validation": "split"}, ValueError, naming("validation", "'split'", "0")),
    "missing layer": ({"key": "cell_type", "layer": "count"}, KeyError, r"layer 'count' in adata"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_invalid_arguments_are_named_and_nothing_is_written(adata, tiny, tmp_path, name):
    options, error, message = BAD[name]
    adata.obs["constant"], adata.obs["flat"], adata.obs["n"] = "x", 1.5, np.arange(60) % 3
    adata.obs["names"] = [f"name {i}" for i in range(60)]
    adata.obs["text"] = [f"{i / 7:.3f}" for i in range(60)]
    adata.obs["nothing"] = pd.Categorical([None] * 60, categories=["a"])
    adata.obs["gaps"] = [None, *["a", "b"] * 29, "a"]
    columns = list(adata.obs)
    with pytest.raises(error, match=message):
        cross_validate(adata, tiny, run_dir=tmp_path / "run", **FAST, **options)
    assert not (tmp_path / "run").exists()
    assert list(adata.obs) == columns
    assert not adata.uns


UNFIT: dict[str, tuple[dict, str]] = {
    "negative values": ({}, "negative"),
    "missing values": ({}, "non-finite"),
    "no matrix": ({}, naming("adata.X", None)),
    "genes that the model lacks": ({}, "0 of 40 genes"),
    "a gene twice": ({}, "gene_0"),
    "too many frozen blocks": ({"freeze": 99}, naming("freeze", 99)),
    "an unknown loss": ({"loss": "mse"}, "mse"),
}


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize("name", UNFIT)
def test_invalid_data_or_options_leave_no_directory(adata, tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr("scllm.settings.run_dir", tmp_path / "runs")
    options, message = UNFIT[name]
    if name in ("negative values", "missing values"):
        adata.X.data[:] = -1 if name == "negative values" else np.nan
    elif name == "no matrix":
        adata.X = None
    elif name == "genes that the model lacks":
        adata.var_names = [f"other_{i}" for i in range(adata.n_vars)]
    elif name == "a gene twice":
        adata.var_names = ["gene_0", *adata.var_names[:-1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # the linear model must not be first to read the matrix
        with pytest.raises((ValueError, KeyError), match=message):
            cross_validate(adata, tiny, key="cell_type", n_folds=3, **FAST, **options)
    assert not (tmp_path / "runs").exists()
    assert not adata.uns


def test_rare_labels_are_warned_of_and_scored_in_the_folds_that_contain_them(adata, tiny):
    adata.obs["label"] = ["one", *["two"] * 2, *["A", "B"] * 28, "A"]
    with pytest.warns(UserWarning, match="label") as warned:
        table = cross_validate(adata, tiny, key="label", n_folds=3, **FAST)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2
    assert re.search(naming("obs['label']", "n_folds=3", "'one', 'two'"), messages[0])
    assert re.search(naming("obs['label']", "'one'", "one fold"), messages[1])
    assert np.isfinite(table["macro_f1"]).all()
    rows = settings_of(adata)["table"].query("metric == 'f1' and `class` == 'one' and method == 'model'")
    assert rows["value"].tolist() == [0]


@pytest.mark.filterwarnings("ignore:.*in one fold only")
def test_labels_in_only_one_fold_can_have_a_class_weight(adata, tiny):
    adata.obs["label"] = [*["one"] * 3, *["A", "B"] * 28, "A"]
    adata.obs["donor"] = ["x"] * 20 + ["y"] * 20 + ["z"] * 20
    table = cross_validate(
        adata, tiny, key="label", group_key="donor", n_folds=3, validation=0, class_weight={"one": 5, "A": 2}, **FAST
    )
    assert np.isfinite(table["macro_f1"]).all()
    with pytest.raises(KeyError, match=r"'on' is not a label of obs\['label'\]. Did you mean 'one'.*class_weight"):
        cross_validate(adata, tiny, key="label", n_folds=3, validation=0, class_weight={"on": 5}, **FAST)


def parts_of_fold(run_dir, number, column):
    """Return the groups of the training and of the validation cells."""
    with np.load(run_dir / f"fold-{number}" / "cells.npz") as cells:
        return set(column[cells["train"]]), set(column[cells["validation"]])


def test_groups_do_not_change_the_input_of_heads(adata, tiny, tmp_path):
    adata.obs["donor"] = ["x"] * 20 + ["y"] * 20 + ["z"] * 20
    for group_key in (None, "donor"):
        run_dir = tmp_path / str(group_key)
        cross_validate(
            adata, tiny, key="cell_type", group_key=group_key, n_folds=3, run_dir=run_dir, keep_models=True, **FAST
        )
        assert {models.load(run_dir / f"fold-{i}" / "model").head_specs[0].reads for i in range(3)} == {"both"}


def test_folds_with_three_training_groups_are_validated_on_whole_groups(adata, tiny, tmp_path, caplog):
    column = adata.obs["donor"] = np.repeat(list("abcd"), 15)
    with caplog.at_level("INFO", logger="scllm"):
        cross_validate(adata, tiny, key="cell_type", group_key="donor", n_folds=4, run_dir=tmp_path, **FAST)
    assert re.search(naming("whole groups", "1 of the 3 training groups"), caplog.text)
    for number in range(4):
        training, held_out = parts_of_fold(tmp_path, number, column)
        assert len(training) == 2
        assert not training & held_out


def test_folds_whose_groups_are_too_few_are_validated_on_single_cells(adata, tiny, tmp_path, caplog):
    two_left = adata.obs["three donors"] = np.tile(list("abc"), 20)
    adata.obs["donor"] = own_label = np.tile(list("abcd"), 15)
    adata.obs["label"] = np.where(own_label == "a", "only a", adata.obs["cell_type"])
    adata.obs["label"] = np.where(own_label == "b", "only b", adata.obs["label"])
    adata.obs["label"] = np.where(own_label == "c", "only c", adata.obs["label"])
    options = {"n_folds": 3, "group_key": "three donors", "run_dir": tmp_path / "three", **FAST}
    with caplog.at_level("INFO", logger="scllm"):
        cross_validate(adata, tiny, key="cell_type", **options)
    assert re.search(naming("validating on single cells", "2 groups"), caplog.text)
    training, held_out = parts_of_fold(tmp_path / "three", 0, two_left)
    assert training == held_out == {"b", "c"}
    options = {"n_folds": 4, "group_key": "donor", "run_dir": tmp_path / "own", **FAST}
    caplog.clear()
    with caplog.at_level("INFO", logger="scllm"), pytest.warns(UserWarning, match=naming("obs['label']", "one fold")):
        cross_validate(adata, tiny, key="label", **options)
    assert re.search(naming("validating on single cells", "whole groups", "label"), caplog.text)


def test_labels_like_numbers_are_labels(adata, tiny):
    adata.obs["leiden"] = np.where(adata.obs["cell_type"] == "A", "0", "1")
    cross_validate(adata, tiny, key="leiden", n_folds=2, **FAST)
    assert adata.obs["leiden_cv"].cat.categories.tolist() == ["0", "1"]


def test_labels_missing_from_the_reference_are_never_predicted(adata, tiny, tmp_path):
    reference, query = adata[adata.obs["batch"] == "first"].copy(), adata[adata.obs["batch"] == "second"].copy()
    query.obs["cell_type"] = query.obs["cell_type"].cat.add_categories("new")
    query.obs.iloc[:10, query.obs.columns.get_loc("cell_type")] = "new"
    tuned = finetune(reference, tiny, key="cell_type", epochs=1)
    unknown = (10, 30, "obs['cell_type']", "first: 'new'", "'A', 'B'")
    with pytest.warns(UserWarning, match=naming(*unknown, "threshold=")):
        classify(query, tuned)
    for data in (reference, query):
        data.obsm["X"] = np.log1p(data.X.toarray())
    with pytest.warns(UserWarning, match=naming(*unknown, "cell_type_transferred_prob")):
        transfer_labels(query, reference, key="cell_type", use_rep="X")
    for column in ("scllm_label", "cell_type_transferred"):
        assert query.obs[column].cat.categories.tolist() == ["A", "B"]
        assert query.obs[column].notna().all()
    assert query.obs["cell_type"].iloc[0] == "new"


def test_backed_data_are_an_error(adata, tiny, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match=naming("adata", "backed", "adata.to_memory()")):
        cross_validate(backed, tiny, key="cell_type")
    backed.file.close()


@pytest.mark.parametrize("form", ["dense", "csc"])
def test_other_matrix_formats_give_the_same_scores(adata, tiny, form):
    other = adata.copy()
    other.X = adata.X.toarray() if form == "dense" else sparse.csc_matrix(adata.X)
    expected = cross_validate(adata, tiny, key="cell_type", n_folds=2, **FAST)
    pd.testing.assert_frame_equal(cross_validate(other, tiny, key="cell_type", n_folds=2, **FAST), expected)


@pytest.mark.parametrize("layer", [None, "counts"])
def test_a_matrix_stored_by_columns_is_converted_once_for_all_folds(adata, tiny, monkeypatch, layer):
    whole, turn = [], sparse.csc_matrix.tocsr
    adata.layers["counts"] = adata.X = sparse.csc_matrix(adata.X)

    def counted(self, *args, **kwargs):
        whole.append(1) if self.shape == adata.shape else None
        return turn(self, *args, **kwargs)

    monkeypatch.setattr(sparse.csc_matrix, "tocsr", counted)
    cross_validate(adata, tiny, key="cell_type", n_folds=3, layer=layer, baseline=False, **FAST)
    assert len(whole) == 1


def test_each_fold_is_logged(adata, tiny, caplog):
    with caplog.at_level(logging.INFO, logger="scllm"):
        cross_validate(adata, tiny, key="cell_type", n_folds=2, **FAST)
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("fold ")]
    assert len(lines) == 2
    assert lines[0].startswith("fold 1 of 2: accuracy ")
    assert json.dumps(lines[0]).count("(") == 2


def test_a_model_already_fine_tuned_on_the_labels_causes_a_warning(adata, tiny, tmp_path):
    tuned = finetune(adata, tiny, key="cell_type", epochs=1, run_dir=tmp_path / "run")
    with pytest.warns(UserWarning, match=naming("fine-tuned", "'cell_type'")):
        cross_validate(adata, tuned, key="cell_type", n_folds=2, **FAST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cross_validate(adata, tuned, key="batch", n_folds=2, **FAST)
