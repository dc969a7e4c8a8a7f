"""What verbs leave in uns, and what is said when something is not there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm import _checks
from scllm._results import record, recorded, storable_table, thinned_history


@dataclass(frozen=True)
class Settings:
    lr: float = 1e-4
    patience: int | None = None


PARAMS = {
    "genes": ("TP53", "MYC"),
    "combinations": [["TP53"], ["TP53", "MYC"]],
    "fractions": (0.9, 0.1),
    "run_dir": Path("runs") / "blood",
    "group_key": None,
    "class_weight": {"CD4+/CD25 T Reg": 2.0, "B": 1.0},
    "kinds": {"b", "a"},
    "config": Settings(),
    "n": 3,
    "flag": True,
}
TABLE = pd.DataFrame({"gene": ["a", "b", None], "n": [1, 2, 3], "score": [0.5, np.nan, 1.0], "empty": [None] * 3})


@pytest.mark.parametrize("extension", ["h5ad", "zarr"])
def test_results_survive_writing(adata, tmp_path, extension) -> None:
    record(adata, "verb", PARAMS, TABLE)
    path = tmp_path / f"data.{extension}"
    getattr(adata, f"write_{extension}")(path)
    entry = getattr(ad, f"read_{extension}")(path).uns["scllm"]["verb"]
    assert list(entry["params"]["genes"]) == ["TP53", "MYC"]
    assert list(entry["params"]["combinations"]) == ["TP53", "TP53,MYC"]
    assert entry["params"]["fractions"].tolist() == [0.9, 0.1]
    assert entry["params"]["run_dir"] == str(Path("runs") / "blood")
    assert list(entry["params"]["class_weight"]["keys"]) == ["CD4+/CD25 T Reg", "B"]
    assert entry["params"]["class_weight"]["values"].tolist() == [2.0, 1.0]
    assert list(entry["params"]["kinds"]) == ["a", "b"]
    assert set(entry["params"]["config"]) == {"lr"}
    assert "group_key" not in entry["params"]
    table = entry["table"].reset_index(drop=True)
    assert table["gene"].isna().tolist() == [False, False, True]
    assert table["gene"].dropna().tolist() == ["a", "b"]
    assert table["n"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(table["score"], TABLE["score"])


def test_caller_keeps_its_table(adata) -> None:
    before = TABLE.copy()
    record(adata, "verb", {}, TABLE)
    adata.uns["scllm"]["verb"]["table"]["n"] = 0
    pd.testing.assert_frame_equal(TABLE, before)


def test_a_second_verb_leaves_the_first(adata) -> None:
    record(adata, "first", {"a": 1})
    record(adata, "second", {})
    record(adata, "first", {"b": 2})
    assert adata.uns["scllm"]["first"] == {"params": {"b": 2}}
    assert adata.uns["scllm"]["second"] == {"params": {}}


def test_recording_on_a_view_leaves_its_parent(adata) -> None:
    record(adata, "first", {})
    view = adata[:10]
    with pytest.warns(ad.ImplicitModificationWarning):
        record(view, "second", {})
    assert set(view.uns["scllm"]) == {"first", "second"}
    assert set(adata.uns["scllm"]) == {"first"}


def test_recorded_says_what_to_call(adata) -> None:
    with pytest.raises(KeyError, match=r"'benchmark' is not in adata\.uns.*Call scllm\.tl\.benchmark"):
        recorded(adata, "benchmark", made_by="scllm.tl.benchmark(adata)")


def test_missing_column_offers_close_names(adata) -> None:
    with pytest.raises(KeyError, match=r"'celltype' is not a column of adata\.obs\. Did you mean 'cell_type'\?"):
        _checks.obs_column(adata.obs, "celltype")
    with pytest.raises(KeyError, match="There is 'cell_type', 'batch'"):
        _checks.obs_column(adata.obs, "zzz")


def test_labels_are_the_classes_that_occur(adata) -> None:
    adata.obs["label"] = pd.Categorical(["x", None] * 30, categories=["unused", "x", "y"])
    adata.obs.loc[adata.obs_names[2], "label"] = "y"
    found = _checks.labels(adata.obs, "label")
    assert list(found.cat.categories) == ["x", "y"]
    assert found.isna().sum() == 30
    adata.obs["flag"] = np.arange(60) > 3
    assert list(_checks.labels(adata.obs, "flag").cat.categories) == ["False", "True"]


def test_numbers_and_one_class_are_no_labels(adata) -> None:
    adata.obs["n"] = np.arange(60) % 3
    adata.obs["one"] = "A"
    with pytest.raises(ValueError, match=r"astype\('category'\)"):
        _checks.labels(adata.obs, "n")
    with pytest.raises(ValueError, match=naming("obs['one']", 2, "1 ('A')")):
        _checks.labels(adata.obs, "one")


def test_lists_of_names_are_cut(adata) -> None:
    adata.obs = pd.DataFrame(0, index=adata.obs_names, columns=[f"c{i}" for i in range(20)])
    with pytest.raises(KeyError, match=r"There is 'c0', .*'c7' and 12 more"):
        _checks.obs_column(adata.obs, "zzz")


def test_embedding_is_finite_and_there(adata) -> None:
    adata.obsm["X_scllm"] = np.zeros((60, 4))
    with pytest.raises(KeyError, match="Did you mean 'X_scllm'"):
        _checks.embedding(adata, "X_sclm")
    adata.obsm["X_scllm"][3, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 60 cells.*first: 'cell_3'"):
        _checks.embedding(adata, "X_scllm")


@pytest.mark.parametrize("extension", ["h5ad", "zarr"])
@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pd.cut(pd.Series([1.0, 5.0, 9.0]), [0, 4, 10]), ["(0, 4]", "(4, 10]", "(4, 10]"]),
        (
            pd.Series(pd.to_datetime(["2020-01-02", None, "2021-01-02"])),
            ["2020-01-02 00:00:00", None, "2021-01-02 00:00:00"],
        ),
        (pd.Series(["x", None, "y"], dtype="string"), ["x", None, "y"]),
        (pd.Series([1, "a", "1"]).astype("category"), ["1", "a", "1"]),
        (pd.Series([1, None, 3], dtype="Int64"), [1, None, 3]),
        (pd.Series([None] * 3), [None] * 3),
    ],
    ids=["intervals", "dates", "strings with gaps", "mixed categories", "integers with gaps", "nothing"],
)
def test_any_column_of_obs_can_be_stored(tmp_path, column, text, extension) -> None:
    table = storable_table(pd.DataFrame({"column": column}))
    table.index = [f"cell_{i}" for i in range(len(table))]
    path = tmp_path / f"a.{extension}"
    getattr(ad.AnnData(np.ones((len(table), 1)), obs=table), f"write_{extension}")(path)
    back = getattr(ad, f"read_{extension}")(path).obs["column"]
    for found, expected in zip(back, text, strict=True):
        assert pd.isna(found) if expected is None else found == expected


def history(n_steps: int, every: int) -> pd.DataFrame:
    lines = [{"step": step, "split": "train", "loss": 1 / step} for step in range(1, n_steps + 1)]
    lines += [{"step": step, "split": "validation", "loss": (step - 777) ** 2} for step in range(every, n_steps, every)]
    return pd.DataFrame(lines).sort_values("step", kind="stable", ignore_index=True)


def test_a_long_history_is_thinned_evenly_and_keeps_all_of_validation() -> None:
    whole = history(50_000, every=100)
    found = thinned_history(whole)
    assert len(found) == 2_000
    assert found.merge(whole).equals(found)  # rows are as they were, in the same order
    validation, training = (found[found["split"] == split] for split in ("validation", "train"))
    assert validation["step"].tolist() == list(range(100, 50_000, 100))
    assert training["step"].iloc[[0, -1]].tolist() == [1, 50_000]
    assert set(training["step"].diff().dropna()) <= {33, 34}
    assert isinstance(found.index, pd.RangeIndex)
    short = history(1_000, every=10)
    assert thinned_history(short) is short


def test_more_validation_than_rows_is_thinned_too_but_not_its_best_row() -> None:
    found = thinned_history(history(6_000, every=2))
    assert len(found) <= 2_000
    assert 950 < (found["split"] == "validation").sum() <= 1_000
    assert 776 in set(found.loc[found["loss"] == 1, "step"])
