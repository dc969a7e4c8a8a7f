"""Mixture weights in pretraining and fine-tuning, of data in memory and in files."""

from __future__ import annotations

import numpy as np
import pytest
from engine.runs import curve, pretrain
from messages import naming

from scllm import models, tl
from scllm.engine import loader
from scllm.tl import TrainConfig

EQUAL = {"key": "batch", "temperature": 0.0}


@pytest.fixture
def cells(adata):
    """60 cells, of which 6 are in the first batch."""
    adata.obs["batch"] = ["few"] * 6 + ["many"] * 54
    return adata


@pytest.fixture
def drawn(monkeypatch):
    """The places of the training cells that are read, in all training of a test."""
    rows, encode = [], loader.Loader._encode

    def noted(self, read, *args):
        if self.training:
            rows.append(self.rows[read.rows])
        return encode(self, read, *args)

    monkeypatch.setattr(loader.Loader, "_encode", noted)
    return lambda: np.concatenate(rows)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_pretraining_draws_groups_equally_often(cells, drawn, tmp_path, where):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    data = cells if where == "memory" else tmp_path / "cells.h5ad"
    pretrain(data, tmp_path / "run", epochs=10, batch_size=60, validation=0, config={"group_weights": EQUAL})
    rows = drawn()
    assert len(rows) == 10 * 60
    # five standard errors of a fair coin
    assert abs((rows < 6).mean() - 0.5) < 5 * np.sqrt(0.25 / len(rows))


def test_fine_tuning_draws_groups_equally_often(cells, drawn, tmp_path):
    tiny = models.build("scgpt", vocab=cells.var_names, size="tiny")
    config = TrainConfig(group_weights=EQUAL)
    options = {"epochs": 10, "validation": 0, "device": "cpu", "run_dir": tmp_path / "run"}
    tl.finetune(cells, tiny, key="cell_type", config=config, **options)
    rows = drawn()
    assert abs((rows < 6).mean() - 0.5) < 5 * np.sqrt(0.25 / len(rows))


def test_the_groups_are_part_of_what_a_run_is(cells, tmp_path):
    settings = {"epochs": 1, "config": {"group_weights": EQUAL}}
    pretrain(cells, tmp_path / "run", **settings)
    first = curve(tmp_path / "run")
    pretrain(cells, tmp_path / "run", **settings)
    assert len(curve(tmp_path / "run")) == len(first)
    cells.obs["batch"] = cells.obs["batch"].to_numpy()[::-1]
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "data.cells")):
        pretrain(cells, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "train.group_weights")):
        pretrain(cells, tmp_path / "run", epochs=1)


@pytest.mark.parametrize(
    ("group_weights", "error", "named"),
    [
        ({"key": "btch", "temperature": 0.5}, KeyError, ["'btch'", "'batch'"]),
        ({"key": "batch", "weights": {"few": 1}}, ValueError, ["obs['batch']", "'many'"]),
        ({"key": "batch", "weights": {"fewer": 1, "many": 1}}, KeyError, ["'fewer'", "'few'"]),
    ],
)
def test_unknown_columns_and_groups_are_an_error_before_anything_is_written(
    cells, tmp_path, group_weights, error, named
):
    with pytest.raises(error, match=naming(*named)):
        pretrain(cells, tmp_path / "run", config={"group_weights": group_weights})
    assert not (tmp_path / "run").exists()


def test_cells_without_a_group_are_an_error_that_counts_them(cells, tmp_path):
    cells.obs.loc[cells.obs_names[:3], "batch"] = None
    with pytest.raises(ValueError, match=naming("obs['batch']", 3)):
        pretrain(cells, tmp_path / "run", validation=0, config={"group_weights": EQUAL})


def test_upsampling_and_group_weights_exclude_each_other(cells):
    tiny = models.build("scgpt", vocab=cells.var_names, size="tiny")
    with pytest.raises(TypeError, match=naming("upsample=True", "group_weights")):
        tl.finetune(cells, tiny, key="cell_type", upsample=True, config=TrainConfig(group_weights=EQUAL))
