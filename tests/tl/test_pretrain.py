"""The effect of each argument of pretraining."""

from __future__ import annotations

import json
from inspect import signature

import anndata as ad
import numpy as np
import pytest
import torch
from messages import naming
from scipy import sparse

from scllm.models import build
from scllm.models.base import HeadSpec
from scllm.pp import split
from scllm.tl import TrainConfig, finetune, pretrain
from scllm.tl._pretrain import prepare

PLAIN = TrainConfig(relational=False)


@pytest.fixture
def train(adata, tmp_path):
    """Pretrain on `adata` briefly, with a new run directory for each call."""
    runs = iter(range(100))

    def call(model="scgpt", data=adata, **options):
        options = {"size": "tiny", "epochs": 1, "batch_size": 16, "run_dir": tmp_path / f"run{next(runs)}"} | options
        return pretrain(data, model, **{name: value for name, value in options.items() if value is not None})

    return call


def cells_of(model) -> dict[str, np.ndarray]:
    return dict(np.load(model.path.parent / "cells.npz"))


def spec_of(model) -> dict:
    return json.loads((model.path.parent / "spec.json").read_text())


def test_the_run_directory_holds_what_is_promised(adata, train):
    model = train(validation=0.2)
    run = model.path.parent
    assert {"spec.json", "model", "best_model.pt", "last.pt", "history.jsonl", "done"} <= {
        p.name for p in run.iterdir()
    }
    best = torch.load(run / "best_model.pt", weights_only=True)
    assert all(torch.equal(best[name], weight) for name, weight in model.state_dict().items())
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert len(lines) == len(model.history) == 3 + 1
    assert all({"step", "epoch", "split", "loss", "lr"} <= set(line) for line in lines)
    assert {line["split"] for line in lines} == {"train", "validation"}
    assert {"mse", "mse_cell"} <= set(lines[0])
    table = adata.uns["scllm"]["pretrain"]["table"]
    np.testing.assert_array_equal(table["loss"], [line["loss"] for line in lines])
    assert not model.training


def test_the_same_call_gives_the_same_weights_and_leaves_randomness_alone(train):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = train(), train(), train(random_state=1)
    assert first.hash() == again.hash() != other.hash()
    assert torch.equal(states[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_the_seed_may_stand_in_the_config(train):
    assert train(random_state=3).hash() == train(config=TrainConfig(random_state=3)).hash()


def test_an_invalid_seed_is_an_error(train, tmp_path):
    with pytest.raises(ValueError, match=naming("random_state", "-1")):
        train(random_state=-1)
    with pytest.raises(TypeError, match=naming("random_state", "whole number", "'a'")):
        train(random_state="a")
    assert not list(tmp_path.iterdir())


def test_a_value_given_both_ways_is_an_error(train, tmp_path):
    for name, value in {"batch_size": 16, "lr": 1e-3, "epochs": 1}.items():
        with pytest.raises(TypeError, match=f"{name}.*twice.*{value}.*{value}"):
            train(config=TrainConfig(**{name: value}), **{name: value})
    with pytest.raises(TypeError, match=naming("steps=4", "epochs=1")):
        train(config=TrainConfig(steps=4))
    assert not list(tmp_path.iterdir())
    assert train(config=TrainConfig(steps=2), epochs=None).history["step"].max() == 2


def test_whole_groups_are_held_out(adata, train):
    cells = cells_of(train(validation=0.4, group_key="batch"))
    batch = adata.obs["batch"].to_numpy()
    assert set(batch[cells["train"]]) & set(batch[cells["validation"]]) == set()
    assert len(cells["train"]) + len(cells["validation"]) == 60


def test_a_share_is_held_out_and_none_if_asked(train):
    cells = cells_of(train(validation=0.25))
    assert [len(cells["train"]), len(cells["validation"])] == [45, 15]
    assert sorted([*cells["train"], *cells["validation"]]) == list(range(60))
    assert len(cells_of(train(validation=0))["validation"]) == 0


def test_cells_for_testing_are_never_touched(adata, train):
    split(adata, fractions=(0.6, 0.2, 0.2))
    part = adata.obs["split"]
    model = train(validation="split")
    cells = cells_of(model)
    assert (part.iloc[cells["train"]] == "train").all()
    assert (part.iloc[cells["validation"]] == "validation").all()
    assert len(cells["train"]) + len(cells["validation"]) == 48
    other = adata.copy()
    scale = np.where(part == "test", 7, 1)[:, None]
    other.X = sparse.csr_matrix(other.X.multiply(scale), dtype=np.float32)
    assert train(data=other, validation="split").hash() == model.hash()


def test_invalid_validation_is_an_error(adata, train, tmp_path):
    with pytest.raises(KeyError, match=r"'cell_typ' is not a column of adata\.obs\. Did you mean 'cell_type'"):
        train(validation="cell_typ")
    with pytest.raises(ValueError, match=naming("obs['cell_type']", "['A', 'B']", "'train'", "'validation'", "'test'")):
        train(validation="cell_type")
    with pytest.raises(ValueError, match=naming("validation", 1.5, "0.1")):
        train(validation=1.5)
    assert not list(tmp_path.iterdir())
    assert not adata.uns


def test_mask_ratio_and_dropout_override_those_of_the_family(train):
    model = train()
    assert spec_of(model)["objective"]["mask_ratio"] == [0.25, 0.5, 0.75]
    assert model.config.dropout == 0.0
    assert train(config=PLAIN).config.dropout == 0.2
    model = train(mask_ratio=0.4, dropout=0.1)
    assert spec_of(model)["objective"]["mask_ratio"] == [0.4]
    assert set(model.history["mask_ratio"].dropna()) == {0.4}
    assert model.config.dropout == 0.1
    model = train(mask_ratio=(0.1, 0.9), epochs=4)
    assert set(model.history["mask_ratio"].dropna()) == {0.1, 0.9}
    for wrong in (0, 1.0, (0.5, 2)):
        with pytest.raises(ValueError, match=naming("mask_ratio", wrong)):
            train(mask_ratio=wrong)


def test_new_models_learn_the_relational_term_unless_told_otherwise(adata, train):
    model = train()
    used = spec_of(model)["train"]
    assert model.config.pooled_skip
    assert used["relational"]
    assert (used["lr"], used["schedule"], used["max_len"]) == (3e-3, "cosine", 256)
    assert (model.history["relational"] > 0).all()
    plain = train(batch_size=None, config=PLAIN)
    used = spec_of(plain)["train"]
    assert not plain.config.pooled_skip
    assert not used["relational"]
    assert (used["lr"], used["warmup"], used["schedule"], used["batch_size"]) == (1e-4, 0, "step", 32)
    assert "relational" not in plain.history
    # the plain objective is that of a model of the original architecture, whose table starts from the cells too
    torch.manual_seed(0)
    fresh = build("scgpt", vocab=adata.var_names, size="tiny")
    same = train(fresh, batch_size=None, config=TrainConfig(gene_init="svd"))
    assert same.hash() == plain.hash()
    assert "relational" not in train("geneformer").history


@pytest.mark.parametrize(("size", "lr", "batch_size"), [("tiny", 3e-3, 64), ("small", 1e-3, 64), ("base", 1e-4, 32)])
def test_small_data_are_read_often_enough(adata, size, lr, batch_size):
    given = {name: argument.default for name, argument in signature(pretrain).parameters.items()}
    given = {name: given[name] for name in signature(prepare).parameters if name not in ("data", "model")}

    def settings(**options):
        return prepare(adata, "scgpt", **given | {"size": size, "device": "cpu"} | options).settings

    used = settings()
    assert (used.lr, used.batch_size, used.relational) == (lr, batch_size, True)
    # the warm-up is at most a tenth of the training
    assert used.warmup == (0 if size == "base" else 20)
    assert settings(epochs=50).warmup == (0 if size == "base" else 5)
    assert settings(epochs=50, config=TrainConfig(warmup=30)).warmup == 30
    # 60 cells are one step of 64 cells
    assert used.epochs == (6 if size == "base" else 500)
    assert settings(epochs=2).epochs == settings(config=TrainConfig(epochs=2)).epochs == 2
    assert settings(config=TrainConfig(steps=7)).n_steps(60) == 7
    assert settings(config=PLAIN).epochs == 6


def test_further_pretraining_keeps_the_relational_term(adata, train, tmp_path):
    related, plain = train(), train(config=PLAIN)
    assert "relational" in train(related).history
    tuned = finetune(adata, related, key="cell_type", epochs=1, run_dir=tmp_path / "tuned")
    assert "relational" in train(tuned).history
    assert "relational" in train(str(related.path)).history
    assert "relational" not in train(plain).history
    assert "relational" not in train(related, config=PLAIN).history


def test_pretraining_an_existing_model_removes_its_heads(train, tiny):
    tiny.set_heads([HeadSpec("cell_type", ("A", "B"))])
    onwards = train(tiny)
    assert onwards.head_specs == ()
    assert len(onwards.heads) == 0
    assert len(tiny.heads) == 1


def test_groups_without_validation_cells_are_an_error(train, tmp_path):
    with pytest.raises(TypeError, match=naming("group_key='batch'", "validation=0")):
        train(validation=0, group_key="batch")
    assert not list(tmp_path.iterdir())


def test_pretraining_an_existing_model_starts_from_a_copy(adata, train, tiny):
    before = tiny.hash()
    onwards = train(tiny, dropout=0.0, lr=1e-7)
    assert tiny.hash() == before
    assert (tiny.config.dropout, tiny.history, tiny.path) == (0.2, None, None)
    assert onwards.config.dropout == 0.0
    assert onwards.config.n_layers == 2
    # At this learning rate, one epoch changes almost nothing, so these are the initial weights.
    for name, weight in tiny.state_dict().items():
        torch.testing.assert_close(onwards.state_dict()[name], weight, atol=1e-5, rtol=0)
    assert onwards.hash() != before
    assert train(onwards.path).config == onwards.config


def test_a_fresh_gene_table_starts_from_the_training_cells_unless_asked_otherwise(adata, train):
    models = [train(lr=1e-7, validation=0.3, config=TrainConfig(gene_init=how)) for how in (None, "svd", "random")]
    counts = adata.X.toarray()[cells_of(models[0])["train"]]
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    programmes = np.linalg.svd(logged)[2][:3]  # right singular vectors
    for model, alike in zip(models, (True, True, False), strict=True):
        columns = model.gene_table().detach().numpy()[:40, :3].T
        similar = [abs(np.corrcoef(a, b)[0, 1]) for a, b in zip(columns, programmes, strict=True)]
        assert min(similar) > 0.99 if alike else max(similar) < 0.9


def test_the_vocabulary_is_that_of_the_data_without_versions(adata, train):
    adata.var_names = [f"ENSG{i // 2:011d}.{i % 2}" for i in range(40)]  # two versions of each gene
    model = train()
    assert model.vocab.genes == tuple(f"ENSG{i:011d}" for i in range(20))
    assert model.vocab.ids(["<cls>", "<pad>", "<mask>"]).tolist() == [20, 21, 22]


@pytest.mark.parametrize("kind", ["path", "backed", "folder", "layer"])
def test_data_may_be_in_files_and_layers(adata, train, tmp_path, kind):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "a.h5ad"
    adata.write_h5ad(path)
    adata.layers["counts"], adata.X = adata.X, adata.X * 0
    data = {"path": path, "backed": ad.read_h5ad(path, backed="r"), "folder": path.parent, "layer": adata}[kind]
    model = train(data=data, layer="counts" if kind == "layer" else None)
    assert model.vocab.genes == tuple(adata.var_names)
    assert np.isfinite(model.history["loss"]).all()
    if kind == "backed":
        assert data.uns["scllm"]["model"]["hash"] == model.hash()
    assert "scllm" not in ad.read_h5ad(path).uns


def test_genes_that_were_renamed_in_memory_keep_their_names(adata, train, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    backed.var_names = [f"renamed_{i}" for i in range(40)]
    model = train(data=backed, n_procs=2, device="cpu")
    assert model.vocab.genes == tuple(backed.var_names)
    view = backed[:50]
    with pytest.raises(ValueError, match=naming("view", "backed", "to_memory")):
        train(data=view)


def test_odd_columns_of_obs_do_not_stand_in_the_way(adata, train):
    adata.obs["mixed"] = [1, "a", None] * 20
    adata.obs["nullable"] = adata.obs["batch"].cat.codes.astype("Float64").where(adata.obs["batch"] == "first")
    adata.var["mixed"] = [1, "a"] * 20
    assert np.isfinite(train().history["loss"]).all()


def test_an_unknown_family_or_path_is_an_error(train):
    with pytest.raises(ValueError, match=naming("model", "'scgtp'", "'geneformer'", "Did you mean 'scgpt'?")):
        train("scgtp")
    with pytest.raises(FileNotFoundError, match=naming("runs/scgpt")):
        train("runs/scgpt")
    with pytest.raises(ValueError, match=naming("size", "'huge'", "scgpt", "'tiny'")):
        train(size="huge")


def test_a_path_with_a_dot_is_a_path(train, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save("model.v2")
    assert train("model.v2").config.d_model == 16


@pytest.mark.parametrize("name", ["model_v1.0", "json.model", ".model", "model..v1", "model."])
def test_an_unknown_name_with_a_dot_is_reported_as_neither_path_nor_module(train, name):
    with pytest.raises(ValueError, match=naming("model", f"'{name}'", "path", "module", "'scgpt'", "spelling")):
        train(name)


def test_a_missing_dependency_of_a_family_is_named(train, tmp_path, monkeypatch):
    (tmp_path / "theirlab").mkdir()
    (tmp_path / "theirlab" / "__init__.py").write_text("import not_installed_here")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        train("theirlab.model")


def test_other_files_in_the_run_directory_are_unchanged(train, tmp_path):
    for name in ("data", "model"):
        run = tmp_path / f"with_{name}"
        (run / name).mkdir(parents=True)
        (run / name / "precious.csv").write_text("1")
        with pytest.raises(ValueError, match=naming("run_dir", run, f"first: '{name}'")):
            train(run_dir=run)
        assert (run / name / "precious.csv").read_text() == "1"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": {"warmup": 2}}, TypeError, naming("config", "TrainConfig", "{'warmup': 2}")),
        ({"dropout": 2}, ValueError, naming("dropout", "got 2")),
        ({"model": "scGPT"}, ValueError, "Did you mean 'scgpt'"),
    ],
)
def test_invalid_arguments_are_named(train, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        train(**options)
    assert not list(tmp_path.iterdir())


def test_several_processes_of_torchrun_cannot_each_start_a_training(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=naming("WORLD_SIZE=2", "n_gpus=", "scllm run RUN_DIR")):
        train(run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_made_is_named(train, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=naming("run_dir", f"'{path}'", f"'{tmp_path / 'file'}'")):
            train(run_dir=path)
