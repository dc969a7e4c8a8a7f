"""Labels come back as they went in, and nothing of an earlier call stays behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from scllm import pl
from scllm._labels import Categories
from scllm.models.base import HeadSpec
from scllm.tl import TrainConfig, classify, classify_genes, cross_validate, embed, finetune, transfer_labels

ONE = {"config": TrainConfig(steps=1), "batch_size": 8}

COLUMNS = {
    "integers": lambda kind: pd.Categorical.from_codes(kind, [10, 2, 7]),
    "small integers": lambda kind: pd.Categorical.from_codes(kind, pd.Index([0, 1], dtype="int8")),
    "nullable integers": lambda kind: pd.Series(pd.array(kind, dtype="Int64")).astype("category").array,
    "floats": lambda kind: pd.Categorical.from_codes(kind, [0.1, 1e-7]),
    "booleans": lambda kind: kind == 1,
    "categories of booleans": lambda kind: pd.Categorical(kind == 1),
    "nullable booleans": lambda kind: pd.array(kind == 1, dtype="boolean"),
    "ordered": lambda kind: pd.Categorical.from_codes(kind, ["low", "high", "never"], ordered=True),
    "ordered integers": lambda kind: pd.Categorical.from_codes(kind, [3, 1], ordered=True),
    "strings": lambda kind: np.array(["b", "a"])[kind],
    "pandas strings": lambda kind: pd.array(np.array(["b", "a"])[kind], dtype="string"),
}


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(params=COLUMNS)
def column(adata, request) -> pd.Series:
    """Labels of some type, as `obs["cluster"]`."""
    adata.obs["cluster"] = COLUMNS[request.param]((adata.obs["cell_type"] == "B").to_numpy(int))
    return adata.obs["cluster"]


def check_alike(found: pd.Series, column: pd.Series) -> None:
    expected = column.astype("category")
    assert found.cat.categories.tolist() == expected.cat.categories.tolist()
    assert found.cat.ordered == expected.cat.ordered
    if expected.cat.categories.dtype.kind in "iufb":
        assert found.cat.categories.dtype.kind == expected.cat.categories.dtype.kind
        assert found.cat.categories.dtype.itemsize == expected.cat.categories.dtype.itemsize
    assert 0 <= (column == found).mean() <= 1  # a TypeError of pandas where categories are others


def test_classify_and_cross_validate_and_transfer_labels_answer_as_the_column_was(adata, tiny, column, tmp_path):
    tuned = finetune(adata, tiny, key="cluster", **ONE)
    tuned.save(tmp_path / "model")
    for model in (tuned, tmp_path / "model"):
        classify(adata, model)
        check_alike(adata.obs["scllm_label"], column)
    cross_validate(adata, tiny, key="cluster", n_folds=2, **ONE)
    check_alike(adata.obs["cluster_cv"], column)
    check_alike(adata.obs["cluster_cv_baseline"], column)
    assert (adata.obs["cluster_cv_baseline"] == column).mean() > 0.9
    adata.obsm["X_scllm"] = np.eye(2)[(adata.obs["cell_type"] == "B").to_numpy(int)]
    transfer_labels(adata, adata.copy(), key="cluster", n_neighbors=3)
    check_alike(adata.obs["cluster_transferred"], column)
    assert (column == adata.obs["cluster_transferred"]).all()
    for predicted in ("cluster_cv", "scllm_label"):
        pl.confusion_matrix(adata, truth="cluster", predicted=predicted, show=False)
    pl.calibration(adata, truth="cluster", show=False)
    pl.roc(adata, truth="cluster", predicted="scllm_label", show=False)
    pl.cv_scores(adata, show=False)
    adata.write_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("name", ["integers", "booleans", "ordered", "strings"])
def test_doubtful_cells_have_no_label_or_are_unknown(adata, tiny, name):
    adata.obs["cluster"] = COLUMNS[name]((adata.obs["cell_type"] == "B").to_numpy(int))
    tuned = finetune(adata, tiny, key="cluster", **ONE)
    classify(adata, tuned)
    sure = adata.obs["scllm_label_prob"].median()
    classify(adata, tuned, threshold=float(sure))
    label, doubtful = adata.obs["scllm_label"], adata.obs["scllm_label_prob"] < sure
    assert doubtful.sum() > 10
    if name in ("integers", "booleans"):
        assert label[doubtful].isna().all()
        assert "unknown" not in label.cat.categories
    else:
        assert (label[doubtful] == "unknown").all()
        assert not label.cat.ordered
    assert label[~doubtful].notna().all()
    pl.confusion_matrix(adata, truth="cluster", predicted="scllm_label", show=False)


@pytest.mark.parametrize("name", ["booleans", "integers", "ordered"])
def test_labels_of_genes_come_back_as_they_were(adata, tiny, name):
    adata.var["kind"] = COLUMNS[name](np.arange(40) % 2)
    for labels in ("kind", adata.var["kind"]):
        classify_genes(adata, tiny, labels=labels, n_folds=2, freeze="encoder", baseline=False)
        check_alike(adata.var["gene_label"], adata.var["kind"])


def test_categories_survive_json():
    column = pd.Series(pd.Categorical([2, 10], categories=[10, 2, 5], ordered=True))
    kept = Categories.of(column)
    spec = HeadSpec("a", ("10", "2"), categories=kept)
    assert HeadSpec.from_dict(json.loads(json.dumps(asdict(spec)))) == spec


def test_a_head_of_an_earlier_version_answers_with_strings(adata, tiny):
    tiny.set_heads([HeadSpec("old", ("x", "y"))])
    classify(adata, tiny)
    assert adata.obs["scllm_label"].cat.categories.tolist() == ["x", "y"]


def written(adata) -> set[str]:
    names = set(adata.uns["scllm"].get("probabilities", {"table": {"column": []}})["table"]["column"])
    return {*adata.obs, *adata.obsm, *(f"classes of {name}" for name in names)}


def test_nothing_of_a_call_with_other_heads_stays_behind(adata, tiny):
    adata.obs["level"] = np.arange(60) / 60
    adata.obs["scllm_label_mine"] = "not ours"
    heads = {
        "two": finetune(adata, tiny, key=["cell_type", "batch"], **ONE),
        "one": finetune(adata, tiny, key="batch", **ONE),
        "value": finetune(adata, tiny, key="level", **ONE),
        "mixed": finetune(adata, tiny, key=["cell_type", "level"], **ONE),
    }
    expected = {name: written(classify(adata, model, copy=True)) for name, model in heads.items()}
    assert "scllm_label_level_prob" not in expected["mixed"]
    classify(adata, heads["two"], key_added="other")
    others = {name for name in written(adata) if "other" in name}
    for name in ("two", "one", "mixed", "value", "two", "value", "one", "two"):
        classify(adata, heads[name])
        assert written(adata) == expected[name] | others, name


def test_cross_validation_of_values_leaves_no_classes_of_labels(adata, tiny):
    cross_validate(adata, tiny, key="batch", n_folds=2, **ONE)
    adata.obs["batch"] = np.arange(60) / 60
    cross_validate(adata, tiny, key="batch", n_folds=2, baseline=False, **ONE)
    assert {name for name in written(adata) if "batch" in name} == {"batch", "batch_cv", "batch_cv_fold"}


def test_embedding_with_another_model_replaces_what_was_said_of_the_first(adata, tiny):
    embed(adata, finetune(adata, tiny, key="batch", **ONE))
    embed(adata, tiny)
    assert "heads" not in adata.uns["scllm"]["embed"]
    assert adata.uns["scllm"]["embed"]["models"]["hash"].tolist() == [tiny.hash()]
