"""``resume="auto"`` returns a finished model only where nothing that made it has changed."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from scllm import datasets, models, pp, settings
from scllm.tl import TrainConfig, classify_genes, cross_validate, finetune, pretrain


@pytest.fixture(scope="module")
def _cells():
    """200 cells by 40 genes, with names in a column, and as a layer."""
    cells = datasets.toy(n_cells=200, n_genes=40)
    cells.var["symbol"] = cells.var_names
    cells.var_names = [f"row_{i}" for i in range(40)]
    cells.layers["counts"] = cells.X.copy()
    cells.obs["donor"] = pd.Categorical([f"donor {i % 4}" for i in range(200)])
    cells.obs["value"] = np.asarray(cells.X.sum(1), np.float64).ravel()
    return pp.split(cells, fractions=(0.8, 0.2), copy=True)


@pytest.fixture(scope="module")
def _model(_cells):
    return models.build("scgpt", vocab=_cells.var["symbol"], n_layers=1, n_heads=2, d_model=16, d_hidden=16)


@pytest.fixture
def cells(_cells):
    return _cells.copy()


@pytest.fixture
def model(_model):
    return copy.deepcopy(_model)


OPTIONS = {
    "key": ["cell_type", "value"], "validation": "split", "epochs": 1, "device": "cpu", "layer": "counts",
    "config": TrainConfig(head_reads="both"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(_cells, _model, tmp_path_factory):
    """A run that is done."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    finetune(_cells.copy(), copy.deepcopy(_model), run_dir=run_dir, **OPTIONS)
    return run_dir


def one_value(cells):
    cells.layers["counts"].data[123] += 1


def a_value_to_a_zero(cells):
    cells.layers["counts"].data[123] = 0


def two_cells_swapped(cells):
    order = np.arange(200)
    order[[7, 100]] = order[[100, 7]]
    cells.layers["counts"] = cells.layers["counts"][order]


def a_label(cells):
    first, other = cells.obs["cell_type"].unique()[:2]
    cells.obs.loc[cells.obs["cell_type"].eq(first).idxmax(), "cell_type"] = other


def the_name_of_a_label(cells):
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.rename_categories(lambda name: f"{name}!")


def a_label_to_predict(cells):
    cells.obs.loc[cells.obs_names[3], "value"] += 1


def the_split(cells):
    cells.obs["split"] = cells.obs["split"].to_numpy()[::-1]


def names_of_genes(cells):
    cells.var_names = [f"gene {i}" for i in range(40)]


def the_column_that_names_genes(cells):
    cells.var["symbol"] = cells.var["symbol"].to_numpy()[::-1]


CHANGES = [
    one_value, a_value_to_a_zero, two_cells_swapped, a_label, the_name_of_a_label, a_label_to_predict, the_split,
    names_of_genes, the_column_that_names_genes,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_finished_run_is_not_returned_after_one_thing_in_the_data_changed(change, finished, cells, model):
    change(cells)
    with pytest.raises(ValueError, match=str(finished)):
        finetune(cells, model, run_dir=finished, **OPTIONS)


def test_a_finished_run_is_not_returned_for_136_other_cells_of_200(finished, cells, model):
    spread = np.unique(np.linspace(0, 199, 64).astype(int))
    others = np.setdiff1d(np.arange(200), spread)
    assert len(others) == 136
    shuffled = cells.layers["counts"].tolil()
    shuffled[others] = shuffled[np.random.default_rng(0).permutation(others)]
    cells.layers["counts"] = shuffled.tocsr()
    with pytest.raises(ValueError, match=r"data\.fingerprint"):
        finetune(cells, model, run_dir=finished, **OPTIONS)


@pytest.mark.parametrize(
    ("what", "option"),
    [
        ("train.lr", {"lr": 0.01}),
        ("train.head_reads", {"config": TrainConfig(head_reads="last")}),
        ("params.upsample", {"upsample": True}),
        ("objective.class_weight", {"class_weight": "balanced"}),
        ("params.layer", {"layer": None}),
        ("freeze", {"freeze": "encoder"}),
        ("data.cells (the split, labels and weights of cells)", {"validation": 0.3}),
    ],
)
def test_a_finished_run_is_not_returned_for_other_settings(what, option, finished, cells, model):
    with pytest.raises(ValueError, match=re.escape(what)):
        finetune(cells, model, run_dir=finished, **OPTIONS | option)


def test_a_finished_run_is_not_returned_for_another_model_or_encoder(finished, cells, model):
    other = copy.deepcopy(model)
    other.gene_embedding.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="weights"):
        finetune(cells, other, run_dir=finished, **OPTIONS)
    coarse = copy.deepcopy(model)
    coarse.encoder = replace(coarse.encoder, n_bins=5)
    with pytest.raises(ValueError, match=r"encoder\.n_bins"):
        finetune(cells, coarse, run_dir=finished, **OPTIONS)


def test_other_medians_are_another_encoder(cells, tmp_path):
    model = models.build("geneformer", vocab=cells.var["symbol"], size="tiny")
    model.encoder = replace(model.encoder, medians=np.ones(len(model.vocab)))
    options = {"run_dir": tmp_path / "run", "epochs": 1, "device": "cpu", "validation": 0.1}
    pretrain(cells, model, **options)
    model.encoder = replace(model.encoder, medians=np.linspace(1, 2, len(model.vocab)))
    with pytest.raises(ValueError, match=r"encoder\.medians"):
        pretrain(cells, model, **options)


def test_the_same_data_elsewhere_are_the_same_run(finished, cells, model, tmp_path):
    expected = models.load(finished).hash()
    moved = cells.copy()
    moved.obs_names = [f"another name {i}" for i in range(200)]
    moved.obs["something"] = 1
    moved.layers["counts"] = moved.layers["counts"].tocsc().astype(np.float64)
    moved.write_h5ad(tmp_path / "moved.h5ad")
    for data in (moved, tmp_path / "moved.h5ad"):
        assert finetune(data, model, run_dir=finished, **OPTIONS).hash() == expected


def test_a_gene_that_a_file_no_longer_measures_is_another_run(cells, model, tmp_path):
    first, second = cells[:100].copy(), cells[100:].copy()
    second.layers["counts"] = second.layers["counts"].multiply(np.arange(40) != 5).tocsr()
    files = [tmp_path / "first.h5ad", tmp_path / "second.h5ad"]
    first.write_h5ad(files[0])
    second.write_h5ad(files[1])
    options = OPTIONS | {"validation": 0.1, "run_dir": tmp_path / "run"}
    finetune(files, model, **options)
    second[:, np.arange(40) != 5].copy().write_h5ad(files[1])
    with pytest.raises(ValueError, match=r"data\.tokens"):
        finetune(files, model, **options)


def test_kept_predictions_of_folds_notice_other_names_of_genes(cells, model, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "run_dir", tmp_path)
    options = {"n_folds": 2, "epochs": 1, "device": "cpu", "baseline": False}
    cross_validate(cells, model, key="cell_type", run_dir=tmp_path / "folds", **options)
    labels = dict.fromkeys(cells.var_names[:20], "yes") | dict.fromkeys(cells.var_names[20:], "no")
    classify_genes(cells, model, labels=labels, run_dir=tmp_path / "genes", **options)
    the_column_that_names_genes(cells)
    with pytest.raises(ValueError, match=r"data\.tokens"):
        cross_validate(cells, model, key="cell_type", run_dir=tmp_path / "folds", **options)
    with pytest.raises(ValueError, match=r"data\.tokens"):
        classify_genes(cells, model, labels=labels, run_dir=tmp_path / "genes", **options)
