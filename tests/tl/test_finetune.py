"""Fine-tuning on columns of obs: which weights are trained, on which cells, and what stays unchanged."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest
import torch
from messages import naming

from scllm import models
from scllm.data.anndata_file import MemoryTables
from scllm.data.cells import StoredCells
from scllm.data.plan import plan
from scllm.data.storage import MemoryRows
from scllm.datasets import toy
from scllm.pp import split
from scllm.tl import TrainConfig, classify, finetune
from scllm.tl._target import find_target


@pytest.fixture
def tune(adata, tiny, tmp_path):
    """Fine-tune `tiny` on `adata` briefly, with a new run directory for each call."""
    runs = iter(range(100))

    def call(key="cell_type", data=adata, model=tiny, **options):
        options = {"epochs": 1, "batch_size": 16, "run_dir": tmp_path / f"run{next(runs)}"} | options
        return finetune(data, model, key=key, **options)

    return call


def cells_of(model) -> dict[str, np.ndarray]:
    return dict(np.load(model.path.parent / "cells.npz"))


def spec_of(model) -> dict:
    return json.loads((model.path.parent / "spec.json").read_text())


def test_a_head_is_trained_and_the_initial_model_is_unchanged(adata, tiny, tune):
    before = tiny.hash()
    tuned = tune(validation=0)  # the last weights, not the best
    assert tuned.head_specs[0].classes == ("A", "B")
    assert (tiny.hash(), tiny.head_specs, tiny.history, tiny.path) == (before, (), None, None)
    assert {"loss", "accuracy"} <= set(tuned.history)
    assert adata.uns["scllm"]["model"]["hash"] == tuned.hash()
    assert list(adata.uns["scllm"]["finetune"]["params"]["key"]) == ["cell_type"]
    assert any((weight != tuned.state_dict()[name]).any() for name, weight in tiny.state_dict().items())


def test_heads_that_are_replaced_are_named(tune, caplog):
    tuned = tune()
    with caplog.at_level(logging.INFO, logger="scllm"):
        again = tune("batch", model=tuned)
    assert any("replacing" in line and "'cell_type'" in line for line in caplog.messages)
    assert [spec.key for spec in again.head_specs] == ["batch"]


def test_the_same_call_gives_the_same_weights(tune):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert tune().hash() == tune().hash() != tune(random_state=1).hash()
    assert torch.equal(states[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    "column",
    [
        pd.Categorical(["B", "A"] * 30, categories=["unused", "B", "A"]), ["x", "y"] * 30, [True, False] * 30,
        pd.array([True, False] * 30, dtype="boolean"), pd.Categorical([3, 1] * 30),
    ],
    ids=["categorical", "string", "boolean", "nullable boolean", "integer categories"],
)  # fmt: skip
def test_labels_are_the_classes_that_occur(adata, tune, column):
    adata.obs["label"] = column
    names = list(dict.fromkeys(map(str, column)))
    tuned = tune("label")
    assert set(tuned.head_specs[0].classes) == set(names)
    codes = cells_of(tuned)["target:label"]
    assert [tuned.head_specs[0].classes[code] for code in codes] == list(map(str, column))


@pytest.mark.parametrize("dtype", ["float32", "float64", "Float64"])
def test_values_are_scaled_by_the_training_cells_only(adata, tune, dtype):
    split(adata, fractions=(0.5, 0.2, 0.3))
    values = np.random.default_rng(0).normal(5, 2, 60)
    values[adata.obs["split"] != "train"] += 1000
    adata.obs["value"] = pd.array(values, dtype=dtype)
    head = tune("value", validation="split").head_specs[0]
    training = values[adata.obs["split"] == "train"]
    assert head.classes is None
    assert (head.mean, head.std) == (pytest.approx(training.mean(), rel=1e-5), pytest.approx(training.std(), rel=1e-5))


def test_each_column_gets_a_head(adata, tune):
    adata.obs["depth"] = np.asarray(adata.X.sum(1)).ravel()
    tuned = tune(["cell_type", "depth", "batch"])
    assert [(head.key, head.classes) for head in tuned.head_specs] == [
        ("cell_type", ("A", "B")), ("depth", None), ("batch", ("first", "second")),
    ]  # fmt: skip
    assert {"accuracy_cell_type", "mse_depth", "accuracy_batch"} <= set(tuned.history)


@pytest.mark.parametrize("what", ["label", "finite value"])
def test_cells_without_a_label_are_left_out_with_a_warning(adata, tune, what):
    column = adata.obs["cell_type"].astype(object) if what == "label" else pd.Series(np.arange(60.0), adata.obs_names)
    column.iloc[:7] = np.nan
    adata.obs["label"] = column
    with pytest.warns(UserWarning, match=naming("7 of 60 cells", f"no {what}", "obs['label']")):
        tuned = tune("label")
    cells = cells_of(tuned)
    assert sorted([*cells["train"], *cells["validation"]]) == list(range(7, 60))


def test_codes_with_a_gap_are_values_and_a_warning_says_so(adata, tune):
    adata.obs["cluster"] = np.where(np.arange(60) < 7, np.nan, np.arange(60) % 3)
    with pytest.warns(UserWarning, match=naming("obs['cluster']", "whole numbers", ".astype('category')")) as said:
        tuned = tune("cluster")
    assert tuned.head_specs[0].classes is None
    exec(str(said[0].message).split("labels: ")[1].removesuffix("."), {"adata": adata})
    with pytest.warns(UserWarning, match=naming("7 of 60 cells", "no label")):
        assert tune("cluster").head_specs[0].classes == ("0", "1", "2")


def test_a_second_call_without_a_model_warns_that_it_starts_from_the_first(adata, tune):
    tune()
    with pytest.warns(UserWarning, match=naming("fine-tuned on 'cell_type'", "model=")):
        tune(model=None)
    tune("batch", model=None)  # no warning: the model was not fine-tuned on this column
    tune("batch")


def test_with_several_heads_a_cell_with_one_label_is_used(adata, tune):
    adata.obs["a"], adata.obs["b"] = adata.obs["cell_type"].astype(object), adata.obs["batch"].astype(object)
    adata.obs.loc[adata.obs_names[:10], "a"] = np.nan
    adata.obs.loc[adata.obs_names[5:12], "b"] = np.nan
    with pytest.warns(UserWarning, match="cells have no label"):
        cells = cells_of(tune(["a", "b"]))
    assert sorted([*cells["train"], *cells["validation"]]) == [*range(5), *range(10, 60)]


@pytest.mark.filterwarnings("ignore:.* cells have no (label|finite value)", "ignore:after the first epoch")
def test_a_head_without_a_labelled_validation_cell_is_named(adata, tune):
    adata.obs["part"] = np.where(np.arange(60) % 4 == 3, "validation", "train")
    is_known = (np.arange(60) < 20) & (adata.obs["part"] == "train")
    adata.obs["few"] = adata.obs["batch"].astype(object).where(is_known)
    adata.obs["few"] = adata.obs["few"].mask(is_known & (np.arange(60) % 2 == 0), "third")
    adata.obs["few depths"] = np.where(is_known, np.arange(60.0), np.nan)
    with pytest.warns(UserWarning, match=naming("15 validation cells", "'few', 'few depths' of obs")):
        tuned = tune(["cell_type", "few", "few depths"], validation="part")
    validation = tuned.history.query("split == 'validation'")
    assert validation["accuracy_cell_type"].notna().all()
    assert "accuracy_few" not in tuned.history or validation["accuracy_few"].isna().all()
    with pytest.raises(ValueError, match=naming("'validation'", "obs['part']", "none of")):
        tune("few", validation="part")
    adata.obs.loc[adata.obs_names[[3, 7]], "few"] = "seen nowhere else"
    with pytest.warns(UserWarning, match=naming("15 validation cells", "'few' of obs")):
        tune(["cell_type", "few"], validation="part")


@pytest.mark.filterwarnings("ignore:.* cells have no label")
@pytest.mark.parametrize("elsewhere", [None, np.nan, pd.NA, "not labelled"], ids=repr)
def test_a_split_column_may_hold_anything_for_cells_without_a_label(adata, tune, elsewhere):
    has_label = np.arange(60) < 40
    adata.obs["label"] = adata.obs["cell_type"].astype(object).where(has_label)
    part = np.where(np.arange(60) % 4 == 3, "validation", "train").astype(object)
    part[~has_label] = elsewhere
    adata.obs["part"] = part
    cells = cells_of(tune("label", validation="part"))
    assert (len(cells["train"]), len(cells["validation"])) == (30, 10)


@pytest.mark.parametrize("dtype", [object, float, "Int64", "category", "string"])
def test_an_empty_column_is_an_error(adata, tune, dtype):
    adata.obs["label"] = pd.Series([pd.NA if dtype in ("Int64", "string") else np.nan] * 60, adata.obs_names, dtype)
    with pytest.raises(ValueError, match=naming("obs['label']", "all 60 cells", "key=")):
        tune("label")


def test_resuming_needs_a_directory(adata, tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=naming("run_dir=", "resume=True", None)):
        finetune(adata, tiny, key="cell_type", resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", ["A", 1, 0.5, True])
def test_no_cell_at_all_is_an_error_whatever_the_labels(adata, tiny, label):
    adata.obs["label"] = label
    with pytest.raises(ValueError, match=naming("adata", "0 cells")):
        finetune(adata[:0].copy(), tiny, key="label")


def test_a_label_of_one_cell_is_warned_of(adata, tune):
    adata.obs["label"] = ["rare", *["A", "B"] * 29, "A"]
    with pytest.warns(UserWarning, match=naming("obs['label']", "one cell", "'rare'")):
        tune("label")


def test_labels_of_one_cell_that_are_numbers_may_be_values(adata, tune):
    adata.obs["age"] = [f"{min(year, 55) / 10:.1f}" for year in range(60)]
    said = naming("obs['age']", "one cell", "47 more", ".astype(float)")
    with pytest.warns(UserWarning, match="validation cells"), pytest.warns(UserWarning, match=said):
        tune("age")


def test_labels_of_only_validation_cells_cause_a_warning(adata, tune):
    adata.obs["part"] = ["validation"] * 12 + ["train"] * 48
    adata.obs["label"] = ["rare"] * 4 + ["A", "B"] * 28
    said = naming("obs['label']", "'rare'", "4 of 12 validation cells")
    with pytest.warns(UserWarning, match=said):
        tuned = tune("label", validation="part", class_weight="balanced")
    assert spec_of(tuned)["objective"]["class_weight"]["label"] == [1.0, 1.0, 0.0]
    # Only the other eight cells are validated.
    assert tuned.head_specs[0].classes == ("A", "B", "rare")
    labels = cells_of(tuned)["target:label"]
    assert labels[:4].tolist() == [-1] * 4
    assert (labels[4:] >= 0).all()


def test_validation_cells_of_other_labels_than_the_training_cells_are_an_error(adata, tune):
    adata.obs["part"] = ["validation"] * 6 + ["train"] * 54
    adata.obs["label"] = ["rare"] * 6 + ["A", "B"] * 27
    with pytest.raises(ValueError, match=naming("validation cells", "obs['label']", "first: 'rare'")):
        tune("label", validation="part")


def test_cells_without_a_group_are_an_error(adata, tune):
    adata.obs["donor"] = pd.Categorical(["a", "b", "c", None] * 15)
    with pytest.raises(ValueError, match=naming("15 of 60 cells", "group", "obs['donor']")):
        tune(group_key="donor")


def test_cells_are_held_out_by_the_first_key_that_has_labels(adata, tune):
    adata.obs["depth"] = np.asarray(adata.X.sum(1), float).ravel()
    for keys in (["cell_type"], ["depth", "cell_type"]):
        tuned = tune(keys, validation=0.2)
        held_out = adata.obs["cell_type"].iloc[cells_of(tuned)["validation"]]
        assert held_out.value_counts(normalize=True).to_dict() == pytest.approx(
            adata.obs["cell_type"].value_counts(normalize=True).to_dict(), abs=0.05
        )


def test_a_warning_points_at_the_line_that_called(adata, tiny, tmp_path):
    adata.obs["label"] = ["rare", *["A", "B"] * 29, "A"]
    with pytest.warns(UserWarning, match=naming("obs['label']", "one cell")) as warned:
        finetune(adata, tiny, key="label", epochs=1, run_dir=tmp_path / "run")
    assert warned[0].filename == __file__


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_rare_labels_are_drawn_as_often_as_common_ones(adata, tune):
    adata.obs["label"] = ["rare"] * 6 + ["common"] * 54
    cells = cells_of(tune("label", upsample=True, validation=0))
    codes = cells["target:label"][cells["train"]]
    reads = [plan(60, 16, seed=0, epoch=epoch, weights=cells["weights"]) for epoch in range(40)]
    drawn = np.concatenate([codes[read.rows] for epoch in reads for read in epoch])
    assert len(drawn) == 40 * 60
    # five standard errors of a fair coin
    assert abs((drawn == 0).mean() - 0.5) < 5 * np.sqrt(0.25 / len(drawn))
    assert "weights" not in cells_of(tune("label"))


def test_labels_that_are_no_strings_are_weighed_too(adata, tune):
    adata.obs["label"] = [True] * 10 + [False] * 50
    given = spec_of(tune("label", class_weight={True: 3}, validation=0))["objective"]["class_weight"]
    assert given == {"label": [1.0, 3.0]}


def test_rare_labels_weigh_more_where_asked(adata, tune):
    adata.obs["label"] = ["rare"] * 10 + ["common"] * 50
    balanced = spec_of(tune("label", class_weight="balanced", validation=0))["objective"]["class_weight"]
    assert balanced == {"label": pytest.approx([60 / (2 * 50), 60 / (2 * 10)])}  # common, rare
    given = spec_of(tune("label", class_weight={"rare": 3}, validation=0))["objective"]["class_weight"]
    assert given == {"label": [1.0, 3.0]}
    with pytest.raises(KeyError, match=r"'rar' is not a label of obs.*Did you mean 'rare'"):
        tune("label", class_weight={"rar": 3})
    with pytest.raises(ValueError, match=naming("class_weight", "'balanced'", "'equal'")):
        tune("label", class_weight="equal")


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (0, ()), (1, ("layers.0.",)), (2, ("layers.0.", "layers.1.")), ("gene_embedding.*", ("gene_embedding.",)),
        (("layers.1.*", "value_embedding.*"), ("layers.1.", "value_embedding.")),
        ("encoder", ("gene_", "value_", "layers.", "decoder.", "cell_decoder.")),
    ],
)  # fmt: skip
def test_frozen_weights_stay_and_the_others_are_trained(tiny, tune, freeze, frozen):
    tuned = tune(freeze=freeze, lr=1e-3, validation=0)  # the last weights, not the best
    moved = {name for name, weight in tiny.state_dict().items() if (weight != tuned.state_dict()[name]).any()}
    assert not [name for name in moved if frozen and name.startswith(frozen)]
    # Predicting labels does not use the decoders.
    learning = [name for name in tiny.state_dict() if name.startswith(("layers.", "value_embedding.up"))]
    assert set(learning) - moved == {name for name in learning if frozen and name.startswith(frozen)}


def test_heads_on_the_inputs_train_only_the_input_embeddings(tiny, tune):
    tuned = tune(lr=1e-3, validation=0, config=TrainConfig(head_reads="inputs"))
    moved = {name for name, weight in tiny.state_dict().items() if (weight != tuned.state_dict()[name]).any()}
    assert {name.split(".")[0] for name in moved} == {"gene_embedding", "gene_norm", "value_embedding"}
    assert tuned.head_specs[0].reads == "inputs"


@pytest.mark.parametrize(
    ("family", "options"), [("scgpt", {}), ("geneformer", {}), ("geneformer", {"specials": False})], ids=str
)
def test_a_head_like_the_published_one_is_written_in_the_published_format(adata, tune, tmp_path, family, options):
    model = models.build(family, vocab=adata.var_names, size="tiny", **options)
    tuned = tune(model=model, config=TrainConfig(head_reads="published"))
    assert [type(head) for head in tuned.heads] == [type(model.new_head(2))]
    assert tuned.head_specs[0].temperature != 1
    tuned.save(tmp_path / "original", format=family)
    medians = dict.fromkeys(adata.var_names, 1.0) if family == "geneformer" else None
    again = models.load(tmp_path / "original", family=family, medians=medians)
    found, expected = (classify(adata, one, copy=True).obsm["scllm_label_probabilities"] for one in (again, tuned))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_values_are_not_written_in_a_published_format(adata, tune, tmp_path):
    adata.obs["depth"] = np.asarray(adata.X.sum(1), float).ravel()
    tuned = tune("depth", config=TrainConfig(head_reads="published"))
    with pytest.raises(ValueError, match=naming("scgpt", "'depth'", "format='native'")):
        tuned.save(tmp_path / "original", format="scgpt")


def test_epochs_without_validation_cells_have_one_loss_in_the_log(tune, caplog):
    for validation, expected in ((0.2, r"loss [\d.]+, [\d.]+ on validation$"), (0, r"loss [\d.]+$")):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="scllm"):
            tune(validation=validation)
        (said,) = [line for line in caplog.messages if line.startswith("epoch 1 of 1,")]
        assert re.search(expected, said)


def test_a_family_without_other_heads_than_the_published_ones_says_so(adata, tune, tmp_path):
    with pytest.raises(ValueError, match=naming("head_reads='published'", "'both'", "scbert")):
        tune(model=models.build("scbert", vocab=adata.var_names, size="tiny"), config=TrainConfig(head_reads="both"))
    assert not list(tmp_path.iterdir())


def test_freezing_weights_that_do_not_exist_is_an_error(tune, tmp_path):
    with pytest.raises(ValueError, match=naming("freeze", "0 to 2", "3")):
        tune(freeze=3)
    with pytest.raises(ValueError, match=naming("freeze", "'blocks.*'", "'encoder'")):
        tune(freeze="blocks.*")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", ["ce", "bce", "dice", "focal", {"ce": 1.0, "dice": 0.5}])
def test_every_loss_trains(tune, loss):
    tuned = tune(loss=loss)
    assert np.isfinite(tuned.history["loss"]).all()
    assert spec_of(tuned)["objective"]["loss"] == (loss if isinstance(loss, dict) else {loss: 1.0})
    with pytest.raises(ValueError, match=naming("loss", "'mse'", "'ce'")):
        tune(loss="mse")


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_a_split_column_that_splits_a_group_is_an_error(adata, tune):
    split(adata, fractions=(0.8, 0.2), stratify="cell_type")
    with pytest.raises(ValueError, match=naming("obs['split']", "'first'", "obs['batch']", "pp.split(")):
        tune(validation="split", group_key="batch")
    adata.obs["split"] = np.where(adata.obs["batch"] == "first", "train", "validation")
    tune(validation="split", group_key="batch")


@pytest.mark.filterwarnings("ignore:.* cells have no label")
def test_with_several_heads_cells_labelled_only_for_the_second_are_drawn_too(adata, tune):
    adata.obs["first"] = [*["a"] * 20, *["b"] * 10, *[None] * 30]
    adata.obs["second"] = [*[None] * 20, *["c", "d"] * 20]
    weights = cells_of(tune(["first", "second"], upsample=True, validation=0))["weights"]
    np.testing.assert_allclose(weights.sum(), 1)
    assert weights[:20].sum() == pytest.approx(weights[20:30].sum())
    np.testing.assert_allclose(weights[30:], weights[:30].mean())


def test_weights_of_labels_may_be_of_any_head(adata, tune):
    adata.obs["second"] = ["c", "d"] * 30
    found = spec_of(tune(["cell_type", "second"], class_weight={"A": 2, "d": 3}))["objective"]["class_weight"]
    assert found == {"cell_type": [2.0, 1.0], "second": [1.0, 3.0]}


def test_settings_that_are_no_training_settings_are_recorded_too(adata, tune):
    tune(loss={"ce": np.float32(1), "dice": np.float64(0.5)}, freeze=np.int64(1))  # JSON has no such numbers
    params = adata.uns["scllm"]["finetune"]["params"]
    assert params["freeze"] == 1
    assert dict(zip(params["loss"]["keys"], params["loss"]["values"], strict=True)) == {"ce": 1, "dice": 0.5}


def test_labels_are_held_out_alike_and_groups_whole(adata, tune):
    adata.obs["label"] = ["A"] * 40 + ["B"] * 20
    held = cells_of(tune("label", validation=0.2))["validation"]
    assert adata.obs["label"].iloc[held].value_counts().to_dict() == {"A": 8, "B": 4}
    cells = cells_of(tune(group_key="batch", validation=0.4))
    batch = adata.obs["batch"].to_numpy()
    assert not set(batch[cells["train"]]) & set(batch[cells["validation"]])


def test_cells_for_testing_are_never_touched(adata, tune):
    split(adata, fractions=(0.6, 0.2, 0.2), stratify="cell_type")
    model = tune(validation="split", upsample=True, class_weight="balanced")
    other = adata.copy()
    tested = (other.obs["split"] == "test").to_numpy()
    other.X = other.X.multiply(np.where(tested, 7, 1)[:, None]).tocsr()
    other.obs.loc[tested, "cell_type"] = "A"
    assert tune(data=other, validation="split", upsample=True, class_weight="balanced").hash() == model.hash()


def test_down_sampling_needs_counts(adata, tune):
    adata.X = adata.X.log1p()
    with pytest.raises(ValueError, match="looks log-normalised"):
        tune(config=TrainConfig(downsample=0.5))
    tune()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "celltype"}, KeyError, "'celltype' is not a column of adata.obs. Did you mean 'cell_type'"),
        ({"key": "one"}, ValueError, r"2 classes in obs\['one'\], got 1 \('x'\)"),
        ({"key": "n"}, ValueError, naming("obs['n']", "integers", "first: 4", ".astype('category')")),
        ({"key": "flat"}, ValueError, naming("obs['flat']", "distinct values", 2, 1)),
        ({"key": "text"}, ValueError, naming("all 60 labels of obs['text']", "one cell", ".astype(float)")),
        ({"key": "names"}, ValueError, naming("all 60 labels of obs['names']", "one cell", "first: 'name 0'", "key=")),
        ({"class_weight": {"A": -1}}, ValueError, naming("class_weight of 'A'", "-1")),
        ({"class_weight": {"A": "2"}}, ValueError, naming("class_weight of 'A'", "'2'")),
        ({"class_weight": {"a": 1}}, KeyError, naming("'a'", "label of obs['cell_type']", "class_weight")),
        ({"key": "depth", "class_weight": "balanced"}, TypeError, naming("class_weight", "labels", "obs['depth']")),
        ({"loss": {"ce": 1, "dice": -1}}, ValueError, naming("weights of loss", "'dice': -1")),
        ({"loss": {"ce": "1"}}, ValueError, naming("weights of loss", "'ce': '1'")),
        ({"key": "depth", "loss": "dice"}, TypeError, naming("loss='dice'", "labels", "obs['depth']")),
        (
            {"key": "depth", "config": TrainConfig(label_smoothing=0.1)},
            TypeError,
            naming("label_smoothing=0.1", "labels", "obs['depth']"),
        ),
        ({"loss": "mse"}, ValueError, naming("loss", "('ce', 'bce', 'dice', 'focal')", "'mse'")),
        ({"loss": {"focl": 1}}, ValueError, naming("loss", "('ce', 'bce', 'dice', 'focal')", "'focl'")),
        ({"freeze": "encodr"}, ValueError, naming("freeze", "'encodr'", "'encoder'")),
        ({"key": []}, ValueError, naming("key", "[]")),
        ({"key": ["batch", "batch"]}, ValueError, naming("key", "['batch', 'batch']", "once")),
        ({"key": "depth", "upsample": True}, TypeError, naming("upsample=True", "labels", "obs['depth']")),
        ({"key": "batch", "group_key": "batch"}, ValueError, naming(2, "distinct labels", "obs['batch']", "got 1")),
        ({"epochs": 1, "config": TrainConfig(epochs=2)}, TypeError, naming("epochs", "1", "2", "config")),
        ({"config": TrainConfig(max_len=1)}, ValueError, naming("max_len", "got 1", 2)),
        (
            {"lora": 4, "config": TrainConfig(head_reads="inputs")},
            TypeError,
            naming("head_reads='both'", "lora=", "'inputs'"),
        ),
        ({"lora": True}, TypeError, naming("lora", "True", "LoraSettings", "LoraConfig")),
        ({"freeze": 1.5}, TypeError, naming("freeze", "1.5", "'encoder'")),
        ({"freeze": ["layers.*", 1]}, TypeError, naming("freeze", "['layers.*', 1]", "'encoder'")),
        ({"freeze": "*"}, ValueError, naming("freeze", "'*'", "at least one")),
        (
            {"loss": "dice", "config": TrainConfig(label_smoothing=0.1)},
            TypeError,
            naming("label_smoothing=0.1", "'ce'", "{'dice': 1.0}"),
        ),
        (
            {"loss": {"ce": 0, "dice": 1}, "config": TrainConfig(label_smoothing=0.1)},
            TypeError,
            naming("label_smoothing=0.1", "'ce'", "'dice': 1.0"),
        ),
        ({"loss": ["ce", "dice"]}, TypeError, naming("loss", "['ce', 'dice']", "'focal'")),
        ({"key": 5}, TypeError, naming("key", 5)),
        ({"random_state": -1}, ValueError, naming("random_state", "-1")),
        ({"random_state": 1.5}, TypeError, naming("random_state", "1.5", "whole number")),
    ],
)
def test_invalid_arguments_are_named_and_nothing_is_written(adata, tune, tmp_path, options, error, message):
    adata.obs["one"], adata.obs["n"], adata.obs["flat"] = "x", 4, 1.5
    adata.obs["text"] = [f"{i / 7:.3f}" for i in range(60)]
    adata.obs["names"] = [f"name {i}" for i in range(60)]
    adata.obs["depth"] = np.asarray(adata.X.sum(1)).ravel()
    with pytest.raises(error, match=message):
        tune(**options)
    assert not list(tmp_path.iterdir())
    assert not adata.uns


def test_other_labels_in_the_same_directory_are_an_error(adata, tiny, tmp_path):
    options = {"key": "cell_type", "epochs": 1, "run_dir": tmp_path / "run"}
    finetune(adata, tiny, **options)
    adata.obs["cell_type"] = adata.obs["cell_type"].to_numpy()[::-1]
    with pytest.raises(ValueError, match=naming(tmp_path / "run", "data.cells")):
        finetune(adata, tiny, **options)


def test_defaults_are_as_documented(tune):
    tuned = tune(lr=None)
    train = spec_of(tuned)["train"]
    expected = {"lr": 3e-5, "schedule": "linear", "warmup": 20, "use_dropout": False}
    assert {name: train[name] for name in expected} == expected
    assert (tuned.head_specs[0].pooling, tuned.head_specs[0].reads) == ("ranked", "both")


@pytest.mark.parametrize("option", [{"group_key": "donor"}, {"lora": 2}, {"freeze": "encoder"}, {"validation": 0}])
@pytest.mark.parametrize("family", ["scgpt", "scbert"])
def test_the_input_of_heads_depends_on_no_other_argument(adata, tune, family, option):
    adata.obs["donor"] = pd.Categorical(["a", "b", "c", "d"] * 15)
    model = models.build(family, vocab=adata.var_names, size="tiny")
    tuned = tune(model=model, epochs=1, **option)
    assert spec_of(tuned)["train"]["head_reads"] == ("both" if family == "scgpt" else "published")


def test_the_input_of_heads_is_the_one_requested(adata, tune):
    adata.obs["donor"] = pd.Categorical(["a", "b", "c", "d"] * 15)
    for reads in ("inputs", "last"):
        assert tune(group_key="donor", config=TrainConfig(head_reads=reads)).head_specs[0].reads == reads


def test_heads_of_geneformer_read_linear_weights_but_of_inputs(adata, tune):
    model = models.build("geneformer", vocab=adata.var_names, size="tiny")
    assert tune(model=model).head_specs[0].pooling == "linear"
    assert tune(model=model, config=TrainConfig(head_reads="inputs")).head_specs[0].pooling == "ranked"


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_training_reads_rare_labels_as_often(adata, tiny, tmp_path):
    class Recorded(StoredCells):
        """Cells in memory that record which rows were read."""

        def read(self, rows):
            seen.append(np.asarray(rows))
            return super().read(rows)

    adata.obs["label"] = ["rare"] * 6 + ["common"] * 54
    tables = MemoryTables(adata.obs, adata.var)
    source, seen = Recorded(MemoryRows(adata.X), tables, name="adata", layer=None), []
    finetune(source, tiny, key="label", upsample=True, validation=0, epochs=20, batch_size=16, run_dir=tmp_path / "r")
    rows = np.concatenate(
        [rows for rows in seen if rows.ndim and len(rows) < 17]
    )  # batches of training, each cell once
    assert (rows < 6).mean() > 0.25  # a tenth of the cells


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_initial_weights_are_kept_if_training_does_not_improve_them(adata, tiny, tune):
    # Labels independent of the genes: at a high learning rate, the model becomes confident and wrong.
    labels = adata.obs["cell_type"].to_numpy()
    adata.obs["cell_type"] = np.random.default_rng(0).permutation(labels)
    tuned = tune(lr=1.0, epochs=1, validation=0.3, config=TrainConfig(warmup=0, schedule="constant"))
    losses = tuned.history.query("split == 'validation'").set_index("step")["loss"]
    assert losses.idxmin() == 0
    assert not [name for name, weight in tiny.state_dict().items() if (weight != tuned.state_dict()[name]).any()]


def test_a_layer_is_trained_on(adata, tune):
    expected = tune().hash()
    adata.layers["counts"], adata.X = adata.X, adata.X[:, ::-1]
    assert tune(layer="counts").hash() == expected != tune().hash()


@pytest.mark.slow
def test_two_processes_start_and_train_heads_as_one(tmp_path):
    cells = toy(n_cells=120, n_genes=40)
    tiny = models.build("scgpt", vocab=cells.var_names, size="tiny")
    options = {"key": "cell_type", "epochs": 2, "batch_size": 16, "device": "cpu"}
    one, two = (finetune(cells, tiny, n_procs=n, run_dir=tmp_path / str(n), **options) for n in (1, 2))
    np.testing.assert_allclose(one.history["loss"], two.history["loss"], atol=1e-5)
    assert one.head_specs[0].temperature == pytest.approx(two.head_specs[0].temperature, rel=1e-4)


@pytest.mark.parametrize("is_categorical", [False, True])
def test_missing_labels_that_became_text_cause_a_warning_with_working_advice(adata, is_categorical):
    known = adata.obs["cell_type"].astype(object)
    text = known.where(np.arange(adata.n_obs) > 9).astype(str)
    adata.obs["text"] = text.astype("category") if is_categorical else text
    with pytest.warns(UserWarning, match=naming("obs['text']", "'nan'")) as caught:
        assert "nan" in find_target(adata.obs, "text").classes
    assert "= adata.obs['text'].mask(adata.obs['text'].isin(['nan']))." in str(caught[0].message)
    adata.obs["text"] = adata.obs["text"].mask(adata.obs["text"].isin(["nan"]))
    with pytest.warns(UserWarning, match=naming("10 of 60 cells", "no label")):
        assert find_target(adata.obs, "text").classes == tuple(sorted(set(known)))
