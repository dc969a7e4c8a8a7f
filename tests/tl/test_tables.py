"""Tables of any pandas type, in use or not, and what a run leaves behind that could not be set up."""

from __future__ import annotations

from decimal import Decimal

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from scllm.tl import TrainConfig, classify, cross_validate, embed, finetune, pretrain

ONE = {"config": TrainConfig(steps=1), "batch_size": 8}


def columns(n: int) -> dict[str, object]:
    """Columns that files of anndata do not hold, or not without an option."""
    rows = np.arange(n)
    return {
        "string": pd.array(["x", None] * (n // 2), dtype="string"),
        "arrow": pd.array(["x", None] * (n // 2), dtype="string[pyarrow]"),
        "arrow numbers": pd.array([1, None] * (n // 2), dtype="int64[pyarrow]"),
        "sparse": pd.arrays.SparseArray(rows % 2),
        "sparse text": pd.arrays.SparseArray(np.array(["a", "b"], object)[rows % 2]),
        "period": pd.PeriodIndex(["2020-01"] * n, freq="M"),
        "interval": pd.cut(rows, 3),
        "time": pd.DatetimeIndex(["2020-01-01"] * n, tz="Europe/Berlin"),
        "duration": pd.to_timedelta(rows, unit="s"),
        "complex": rows + 1j,
        "list": pd.Series([[1, "a"]] * n, dtype=object).to_numpy(),
        "dict": pd.Series([{"a": [1]}] * n, dtype=object).to_numpy(),
        "mixed": pd.Series([1, "a"] * (n // 2), dtype=object).to_numpy(),
        "decimal": np.array([Decimal(1)] * n, object),
        "a/b": rows,
        "_index": rows,
    }


@pytest.fixture
def odd(adata):
    """`adata` with every odd column in both tables, and indexes of pandas strings."""
    adata.obs = adata.obs.assign(**columns(60))
    adata.var = adata.var.assign(**columns(40))
    adata.obs.index = adata.obs.index.astype("string[pyarrow]").rename("cell_type")
    adata.var.index = adata.var.index.astype("string").rename("arrow")
    return adata


@pytest.mark.parametrize("dtype", ["object", "string[pyarrow]"])
def test_any_table_can_be_trained_on(odd, tiny, dtype):
    odd.obs["cell_type"] = odd.obs["cell_type"].astype(dtype)
    pretrain(odd, tiny, validation=0, **ONE)
    tuned = finetune(odd, tiny, key="cell_type", **ONE)
    cross_validate(odd, tiny, key="cell_type", n_folds=2, **ONE)
    embed(odd, tuned)
    classify(odd, tuned)
    assert set(odd.obs["scllm_label"]) <= {"A", "B"}


@pytest.mark.parametrize("name", columns(2))
def test_a_column_of_any_type_groups_the_cells_or_is_not_used(adata, tiny, name):
    adata.obs[name] = columns(60)[name]
    adata.obs["donor"] = adata.obs["batch"].astype("string")
    tuned = finetune(adata, tiny, key="cell_type", group_key="donor", validation=0.5, **ONE)
    assert set(tuned.heads_on("cell")) == {"cell_type"}


def test_the_copy_in_a_run_directory_holds_names_as_plain_strings_and_no_cells_table(odd, tiny, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("scllm.tl._train.launch", stopped)
    with pytest.raises(KeyboardInterrupt):
        finetune(odd, tiny, key="cell_type", run_dir=tmp_path / "run", **ONE)
    with h5py.File(tmp_path / "run" / "data" / "cells.h5ad") as file:
        obs, var = (ad.io.read_elem(file[name]) for name in ("obs", "var"))
    assert obs.shape == (60, 0)
    assert obs.index.tolist() == [f"cell_{i}" for i in range(60)]
    assert var.index.tolist() == [f"gene_{i}" for i in range(40)]
    assert set(var) == {"string", "arrow", "sparse text"}


def test_a_run_that_could_not_be_set_up_leaves_nothing_and_the_next_call_takes_its_place(
    adata, tiny, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".keep").touch()
    calls = {
        "own": lambda: finetune(adata, tiny, key="cell_type", **ONE),
        "new": lambda: finetune(adata, tiny, key="cell_type", run_dir=tmp_path / "a" / "b", **ONE),
        "folds": lambda: cross_validate(adata, tiny, key="cell_type", n_folds=2, run_dir=tmp_path / "cv", **ONE),
        "given": lambda: finetune(adata, tiny, key="cell_type", run_dir=tmp_path / "run", **ONE),
    }

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("scllm.data.arrays.write_elem", full)
        for call in calls.values():
            with pytest.raises(OSError, match="no space left"):
                call()
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")} == {"run", "run/.keep"}
    for call in calls.values():
        call()


def test_what_a_killed_call_left_half_written_is_written_anew(adata, tiny, tmp_path):
    run = tmp_path / "run"
    tiny.save(run / "model")
    (run / "data").mkdir()
    (run / "data" / "indices.npy").write_bytes(b"half")
    (run / "data" / "cells.partial").write_bytes(b"half")
    finetune(adata, tiny, key="cell_type", run_dir=run, **ONE)
    assert (run / "done").exists()
