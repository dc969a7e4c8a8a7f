"""Cells of types that a model was not trained on: distances and thresholds, compared with computations by hand."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from messages import naming
from scipy.spatial.distance import mahalanobis
from sklearn.metrics import roc_auc_score

from scllm import datasets, models
from scllm.data.genes import match
from scllm.models.base import Batch, HeadSpec
from scllm.tl import TrainConfig, classify, finetune, prune, quantize
from scllm.tl._unknown import cutoff_at

NEW = "beta"
RIDGE = 0.03  # share of the mean variance


@pytest.fixture(scope="module")
def cells():
    """300 cells; one in four is of a type that no model here is trained on."""
    adata = datasets.toy(n_cells=300, n_genes=80)
    adata.obs["depth"] = np.asarray(adata.X.sum(1)).ravel().astype(float)
    return adata


@pytest.fixture(scope="module")
def known(cells):
    adata = cells[cells.obs["cell_type"] != NEW].copy()
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.remove_unused_categories()
    return adata


@pytest.fixture(scope="module")
def run(known, tmp_path_factory):
    """Fine-tune a tiny model on the known types in a run directory."""

    def call(name, family="scgpt", data=known, **options):
        folder = tmp_path_factory.mktemp("runs") / name
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = models.build(family, vocab=known.var_names, size="tiny")
        options = {"key": "cell_type", "epochs": 1, "validation": 0.3, "device": "cpu"} | options
        return finetune(data.copy(), model, run_dir=folder, **options)

    return call


@pytest.fixture(scope="module")
def tuned(run):
    return run("tuned", key=["cell_type", "depth"])


def parts(model) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation cells of the run of a model."""
    stored = np.load(model.path.parent / "cells.npz")
    return stored["train"], stored["validation"]


@torch.no_grad()
def logits_of(model, adata) -> np.ndarray:
    """Compute the logits of each cell, one cell at a time."""
    genes = match(adata.var_names, model.vocab)
    tokens = model.encoder(genes.tokens(adata.X), model.vocab, measured=genes.measured)
    cells = [Batch.from_tokens(tokens.take(np.array([cell]))) for cell in range(adata.n_obs)]
    return torch.cat([model.head_outputs(cell)["cell_type"] for cell in cells]).double().numpy()


def distances_slowly(logits, labels, new) -> np.ndarray:
    """Mahalanobis distance to the closest class mean; the covariance within classes is that of all classes."""
    means = {name: logits[labels == name].mean(0) for name in np.unique(labels)}
    centred = logits - np.stack([means[name] for name in labels])
    within = centred.T @ centred / len(logits)
    inverse = np.linalg.inv(within + RIDGE * np.trace(within) / len(within) * np.eye(len(within)))
    return np.array([min(mahalanobis(cell, mean, inverse) for mean in means.values()) for cell in new])


def test_distances_are_mahalanobis_distances_of_logits(tuned, known, cells):
    adata = classify(cells, tuned, unknown="distance", copy=True)
    training, _ = parts(tuned)
    labels = known.obs["cell_type"].to_numpy(str)[training]
    expected = distances_slowly(logits_of(tuned, known)[training], labels, logits_of(tuned, cells))
    found = adata.obs["scllm_label_cell_type_distance"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert not [name for name in adata.obs if name.startswith("scllm_label_depth_")]


def test_a_new_type_is_farther_than_the_known_ones(tuned, cells):
    adata = classify(cells, tuned, unknown="distance", copy=True)
    is_new, is_unknown = adata.obs["cell_type"] == NEW, adata.obs["scllm_label_cell_type"] == "unknown"
    assert roc_auc_score(is_new, adata.obs["scllm_label_cell_type_distance"]) > 0.75
    assert is_unknown[~is_new].mean() < 0.15


@pytest.mark.parametrize("unknown", ["probability", "distance"])
@pytest.mark.parametrize("fpr", [None, 0.2])
def test_the_threshold_is_an_order_statistic_of_the_validation_cells(tuned, known, unknown, fpr):
    held = known[np.sort(parts(tuned)[1])].copy()
    classify(held, tuned, unknown=unknown, fpr=fpr, key_added="mine")
    score = {"probability": -held.obs["mine_cell_type_prob"], "distance": held.obs.get("mine_cell_type_distance")}
    ascending = np.sort(score[unknown])
    place = int(np.ceil((held.n_obs + 1) * (1 - (fpr or 0.05))))
    [row] = held.uns["scllm"]["classify"]["table"].to_dict("records")
    assert (row["column"], row["score"]) == ("mine_cell_type", unknown)
    assert abs(row["threshold"]) == pytest.approx(abs(ascending[place - 1]), rel=1e-4)
    assert row["n_unknown"] == (held.obs["mine_cell_type"] == "unknown").sum()
    assert held.n_obs - place - 1 <= row["n_unknown"] <= held.n_obs - place + 1  # one may be on the threshold


def test_new_cells_exceed_the_threshold_at_most_as_often_as_stated():
    rng = np.random.default_rng(0)
    rates = [(rng.normal(size=5000) > cutoff_at(rng.normal(size=39), 0.1)).mean() for _ in range(400)]
    assert 0.09 < np.mean(rates) <= 0.1 + 0.005
    with pytest.warns(UserWarning, match=naming(8, "0.1", "fpr=")):
        assert cutoff_at(np.arange(8.0), 0.1) == 7


def test_a_threshold_can_be_a_distance(tuned, cells):
    adata = classify(cells, tuned, unknown="distance", threshold=2.5, copy=True)
    is_unknown = adata.obs["scllm_label_cell_type_distance"] > 2.5
    assert 0 < is_unknown.sum() < 300
    assert ((adata.obs["scllm_label_cell_type"] == "unknown") == is_unknown).all()
    assert adata.uns["scllm"]["classify"]["params"]["unknown"] == "distance"
    del adata.obs["cell_type"]
    classify(adata, tuned)
    assert "scllm_label_cell_type_distance" not in adata.obs
    assert "table" not in adata.uns["scllm"]["classify"]


def test_distances_are_saved_with_the_model(tuned, cells, tmp_path):
    first = classify(cells, tuned, unknown="distance", copy=True)
    tuned.save(tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    again = classify(cells, loaded, unknown="distance", copy=True)
    assert loaded.hash() == tuned.hash()
    pd.testing.assert_frame_equal(again.obs, first.obs)
    again.write_h5ad(tmp_path / "cells.h5ad")


def test_models_of_earlier_versions_load_and_say_what_to_do(tuned, cells, tmp_path):
    shutil.copytree(tuned.path, tmp_path / "model")
    (tmp_path / "model" / "known_cells.npz").unlink()
    old = models.load(tmp_path / "model")
    classify(cells, old, threshold=0.9, copy=True)
    classify(cells, old, unknown="probability", threshold=0.9, copy=True)
    for options in ({"unknown": "distance"}, {"unknown": "distance", "threshold": 3.0}, {"unknown": "probability"}):
        with pytest.raises(ValueError, match=naming(tmp_path / "model", "'cell_type'", "tl.finetune")):
            classify(cells, old, copy=True, **options)


def test_a_damaged_file_is_an_error_that_names_it(tuned, tmp_path):
    shutil.copytree(tuned.path, tmp_path / "model")
    file = tmp_path / "model" / "known_cells.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=naming(file, "copy it again")):
        models.load(tmp_path / "model")


@pytest.mark.parametrize("reads", ["inputs", "last", "published"])
def test_every_kind_of_head_has_distances(run, cells, reads):
    tuned = run(reads, config=TrainConfig(head_reads=reads))
    adata = classify(cells, tuned, unknown="distance", copy=True)
    is_known = adata.obs["cell_type"] != NEW
    assert np.isfinite(adata.obs["scllm_label_distance"]).all()
    assert (adata.obs["scllm_label"] == "unknown")[is_known].mean() < 0.15


@pytest.mark.filterwarnings("ignore:After the first epoch, the model predicts one label")
@pytest.mark.parametrize("family", ["scbert", "scfoundation", "gpt2"])
def test_every_family_has_distances(run, cells, family):
    tuned = run(family, family, batch_size=64)
    adata = classify(cells, tuned, unknown="distance", copy=True)
    is_known = adata.obs["cell_type"] != NEW
    assert np.isfinite(adata.obs["scllm_label_distance"]).all()
    assert (adata.obs["scllm_label"] == "unknown")[is_known].mean() < 0.2


def test_int8_and_pruned_copies_keep_their_distances(tuned, cells):
    first = classify(cells, tuned, unknown="distance", copy=True).obs["scllm_label_cell_type_distance"]
    with pytest.warns(UserWarning, match=naming("distances", "tl.finetune")):
        pruned = prune(tuned, amount=0.02)
    for small in (quantize(tuned), pruned):
        again = classify(cells, small, unknown="distance", copy=True).obs["scllm_label_cell_type_distance"]
        assert np.corrcoef(first, again)[0, 1] > 0.99


def test_two_processes_keep_the_same_as_one(run, known):
    one = run("one", batch_size=30)
    two = run("two", batch_size=30, n_procs=2)
    np.testing.assert_array_equal(parts(one)[1], parts(two)[1])
    for name, array in vars(one.known_cells["cell_type"]).items():
        np.testing.assert_allclose(array, getattr(two.known_cells["cell_type"], name), rtol=1e-3, atol=1e-3)


def test_a_run_that_was_stopped_before_its_end_keeps_the_same(run, known, tmp_path):
    model = models.build("scgpt", vocab=known.var_names, size="tiny")
    options = {"key": "cell_type", "epochs": 1, "device": "cpu", "run_dir": tmp_path / "run"}
    whole = finetune(known.copy(), model, **options)
    (tmp_path / "run" / "done").unlink()
    (tmp_path / "run" / "model" / "known_cells.npz").unlink()
    assert finetune(known.copy(), model, **options).hash() == whole.hash()


def test_training_on_a_model_forgets_the_cells_of_the_old_head(tuned, known, tmp_path):
    again = finetune(known.copy(), tuned, key="depth", epochs=1, device="cpu", run_dir=tmp_path / "run")
    assert again.known_cells == {}
    assert set(tuned.known_cells) == {"cell_type"}


def test_without_validation_cells_a_threshold_is_needed(run, cells):
    tuned = run("unvalidated", validation=0)
    with pytest.raises(ValueError, match=naming("validation", "fpr=0.05", "'cell_type'", "threshold=")):
        classify(cells, tuned, unknown="distance", copy=True)
    adata = classify(cells, tuned, unknown="distance", threshold=3.0, copy=True)
    assert "scllm_label_distance" in adata.obs


def test_labels_that_are_no_text_become_missing(run, known):
    adata = known.copy()
    adata.obs["cell_type"] = pd.Categorical(adata.obs["cell_type"].cat.codes.to_numpy())
    tuned = run("numbers", data=adata)
    classify(adata, tuned, unknown="distance", threshold=2.0)
    is_far = adata.obs["scllm_label_distance"] > 2
    assert is_far.any()
    assert adata.obs["scllm_label"].cat.categories.tolist() == [0, 1, 2]
    assert (adata.obs["scllm_label"].isna() == is_far).all()


BAD = {
    "another score": ({"unknown": "energy"}, ValueError, ("'probability', 'distance'", "'energy'")),
    "a rate alone": ({"fpr": 0.1}, TypeError, ("fpr=0.1", "unknown='distance'")),
    "both": ({"unknown": "distance", "fpr": 0.1, "threshold": 3}, TypeError, ("threshold", "fpr", "3", "0.1")),
    "no rate": ({"unknown": "distance", "fpr": 0}, ValueError, ("fpr", "between 0 and 1", "got 0")),
    "a rate in words": ({"unknown": "probability", "fpr": "low"}, ValueError, ("fpr", "'low'")),
    "a negative distance": ({"unknown": "distance", "threshold": -1}, ValueError, ("threshold", "distance", "-1")),
    "no probability": ({"unknown": "probability", "threshold": 2}, ValueError, ("threshold", "probability", "2")),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_do_not_go_together_write_nothing(tuned, cells, name):
    options, error, seen = BAD[name]
    adata = cells.copy()
    with pytest.raises(error, match=naming(*seen)):
        classify(adata, tuned, **options)
    assert "scllm" not in adata.uns


def test_values_have_no_unknown_cells(cells, tiny):
    tiny.set_heads([HeadSpec("depth", None)])
    with pytest.raises(TypeError, match=naming("unknown='distance'", "'depth'", "values")):
        classify(cells, tiny, unknown="distance", copy=True)
