"""A model knows the data sets and donors that it was trained on, and warns where it is evaluated on them."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm import models, tl
from scllm.models import CellModel
from scllm.tl._ledger import warn_of_seen

QUICK = {"steps": 1, "batch_size": 16}
FILTER = "tissue == 'blood'"


@pytest.fixture
def cells(adata):
    """Four donors in two data sets; donor d1 is in both, and is another person in each."""
    adata.obs["dataset_id"] = pd.Categorical(np.repeat(["first", "second"], 30))
    adata.obs["donor_id"] = np.tile(np.repeat(["d1", "d2", "d3"], 10), 2)
    adata.uns["scllm"] = {"census": {"params": {"obs_filter": FILTER, "census_version": "2025-01-30"}}}
    return adata


def train(data, model: CellModel | str, tmp_path, **options) -> CellModel:
    options = {"run_dir": tmp_path / "run", "validation": 0, "config": tl.TrainConfig(**QUICK), **options}
    size = {"size": "tiny"} if isinstance(model, str) else {}
    return tl.pretrain(data, model, **size, **options)


@pytest.fixture
def trained(cells, tmp_path) -> CellModel:
    """Trained on two donors of the first data set."""
    return train(cells[:20].copy(), "scgpt", tmp_path)


def warnings_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if "trained on" in str(one.message)]


def test_training_is_recorded_and_saved(trained, tmp_path) -> None:
    expected = {
        "verb": ["pretrain"] * 2,
        "dataset": ["first"] * 2,
        "donor": ["d1", "d2"],
        "n_cells": [10, 10],
        "obs_filter": [FILTER] * 2,
        "census_version": ["2025-01-30"] * 2,
    }
    assert trained.report.to_dict("list") == expected
    trained.save(tmp_path / "model")
    assert models.load(tmp_path / "model").report.to_dict("list") == expected


def test_only_training_cells_are_recorded(cells, tmp_path) -> None:
    model = train(cells, "scgpt", tmp_path, validation=0.3, group_key="donor_id")
    held_out = set(cells.obs["donor_id"]) - set(model.report["donor"])
    assert len(held_out) == 1
    assert model.report["n_cells"].sum() == 40


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_training_on_files_is_recorded_with_their_filter(cells, tmp_path, name) -> None:
    getattr(cells, f"write_{name.split('.')[1]}")(tmp_path / name)
    other = cells[:10].copy()
    other.uns["scllm"]["census"]["params"]["obs_filter"] = "tissue == 'lung'"
    other.write_h5ad(tmp_path / "other.h5ad")
    alone = train(tmp_path / name, "scgpt", tmp_path)
    assert alone.report["n_cells"].tolist() == [10] * 6
    assert set(alone.report["obs_filter"]) == {FILTER}
    both = train([tmp_path / name, tmp_path / "other.h5ad"], "scgpt", tmp_path, run_dir=tmp_path / "both")
    assert both.report["n_cells"].tolist() == [20, 10, 10, 10, 10, 10]
    assert set(both.report["obs_filter"]) == {f"{FILTER}; tissue == 'lung'"}


def test_later_training_adds_to_the_record_and_compression_keeps_it(cells, trained, tmp_path) -> None:
    tuned = tl.finetune(
        cells[30:40].copy(),
        trained,
        key="cell_type",
        validation=0,
        config=tl.TrainConfig(**QUICK),
        run_dir=tmp_path / "tuned",
    )
    assert tuned.report[["verb", "dataset", "donor"]].to_numpy().tolist() == [
        ["pretrain", "first", "d1"],
        ["pretrain", "first", "d2"],
        ["finetune", "second", "d1"],
    ]
    assert len(trained.report) == 2
    small = tl.quantize(tuned)
    assert small.report.index.tolist() == ["before", "after"]
    assert small.trained_on.equals(tuned.report)
    small.save(tmp_path / "small")
    assert models.load(tmp_path / "small").trained_on.equals(tuned.report)


def test_models_of_unknown_cells_have_no_record(adata, tmp_path) -> None:
    assert train(adata, "scgpt", tmp_path).report is None


LEDGER = pd.DataFrame({"dataset": ["first", "first", ""], "donor": ["d1", "d2", "d9"]})


@pytest.mark.parametrize(
    ("obs", "n_donors", "n_datasets"),
    [
        ({"dataset_id": ["first", "first", "second"], "donor_id": ["d1", "d3", "d1"]}, 1, 1),
        ({"dataset_id": ["second", "second"], "donor_id": ["d1", "d9"]}, 1, 0),
        ({"donor": ["d1", "d3"]}, 1, 0),
        ({"study": ["first", "second"]}, 0, 1),
        ({"study": ["second"], "donor": [None]}, 0, 0),
        ({"batch": ["first"], "cell_type": ["d1"]}, 0, 0),
    ],
)
def test_donors_are_compared_within_their_data_set(obs, n_donors, n_datasets) -> None:
    obs = pd.DataFrame(obs)
    found = warnings_of(lambda: warn_of_seen(LEDGER, obs))
    assert len(found) == bool(n_donors + n_datasets)
    for text, n in (("come from donors", n_donors), ("come from other donors of data sets", n_datasets)):
        assert any(f"{n} of {len(obs)} cells {text}" in one for one in found) == bool(n)


def test_cross_validation_warns_of_donors_that_the_model_has_seen(cells, trained) -> None:
    options = {"key": "cell_type", "n_folds": 2, "baseline": False, "config": tl.TrainConfig(**QUICK)}
    with pytest.warns(UserWarning, match=naming("20 of 60", "'d1'", "10 of 60", "'first'", "model.report")):
        tl.cross_validate(cells, trained, **options)
    assert not warnings_of(lambda: tl.cross_validate(cells[30:].copy(), trained, **options))


def test_perplexity_warns_of_donors_that_the_model_has_seen(cells, tmp_path) -> None:
    model = train(cells[:20].copy(), "gpt2", tmp_path)
    with pytest.warns(UserWarning, match=naming("10 of 10", "'d2'")):
        tl.perplexity(cells[10:20].copy(), model)
    assert not warnings_of(lambda: tl.perplexity(cells[30:].copy(), model))


def test_benchmark_warns_of_embeddings_whose_model_has_seen_the_donors(cells, trained, tmp_path) -> None:
    fresh = models.build("scgpt", vocab=cells.var_names, size="tiny")
    tl.embed(cells, trained, key_added="X_seen")
    tl.embed(cells, fresh, key_added="X_fresh")
    options = {"key": "cell_type"}
    with pytest.warns(UserWarning, match=naming("20 of 60", "'d1'", "obsm['X_seen']")):
        tl.benchmark(cells, use_rep=["X_seen", "X_fresh"], **options)
    assert not warnings_of(lambda: tl.benchmark(cells, use_rep="X_fresh", **options))
    assert not warnings_of(lambda: tl.benchmark(cells[30:].copy(), use_rep="X_seen", **options))
    tl.embed(cells, fresh, key_added="X_seen")  # the record is replaced with the embedding
    assert not warnings_of(lambda: tl.benchmark(cells, use_rep="X_seen", **options))
    cells.write_h5ad(tmp_path / "cells.h5ad")
