"""A model in a folder: whole or not there, read strictly, nothing executed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from messages import naming
from safetensors.torch import load_file, save_file

from scllm import models
from scllm.models import storage
from scllm.models.base import HeadSpec


@pytest.fixture
def model():
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_hidden": 8}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        built = models.build("scgpt", vocab=["a", "b", "c"], encoder=models.BinEncoder(7, ties="left"), **sizes)
        built.set_heads([HeadSpec("cell_type", ("x/y", "z")), HeadSpec("depth", None, 3.25, 0.1)])
    built.history = pd.DataFrame(
        {"step": [1, 1], "split": ["train", "validation"], "loss": [1 / 3, 1e-9 / 7], "mask_ratio": [0.25, np.nan]}
    )
    return built.eval()


def test_everything_comes_back(model, tmp_path):
    model.save(tmp_path / "deep" / "model")
    again = models.load(tmp_path / "deep" / "model")
    assert (again.config, again.vocab, again.encoder, again.head_specs) == (
        model.config, model.vocab, model.encoder, model.head_specs,
    )  # fmt: skip
    assert again.hash() == model.hash()
    pd.testing.assert_frame_equal(again.history, model.history, check_exact=True)
    assert again.path == model.path == tmp_path / "deep" / "model"
    assert not again.training
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["model"]


def test_a_setting_that_this_version_does_not_have_is_named(model, tmp_path):
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["config"]["rotary"] = True
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=naming("'rotary'", "scgpt")):
        models.load(tmp_path / "model")


def test_a_published_format_is_written_beside_other_files_only_and_is_not_where_the_model_is(model, tmp_path):
    model.set_heads(())
    model.save(tmp_path / "native")
    with pytest.raises(ValueError, match=naming(tmp_path / "native")):
        model.save(tmp_path / "native", format="scgpt")
    assert models.load(tmp_path / "native").hash() == model.hash()
    model.save(tmp_path / "scgpt", format="scgpt")
    assert model.path == tmp_path / "native"


def test_history_lines_hold_what_was_logged_and_nothing_else(model, tmp_path):
    model.save(tmp_path / "model")
    lines = [json.loads(line) for line in (tmp_path / "model" / "history.jsonl").read_text().splitlines()]
    assert lines[1] == {"step": 1, "split": "validation", "loss": 1e-9 / 7}


def test_a_model_trained_here_goes_through_the_folder_of_scgpt(model, tmp_path):
    model.set_heads(model.head_specs[:1])
    model.save(tmp_path / "scgpt", format="scgpt")
    again = models.load(tmp_path / "scgpt", family="scgpt")
    assert again.vocab.tokens == (*model.vocab.tokens, "<eoc>")  # which scGPT appends to every vocabulary
    assert (again.config, again.encoder) == (model.config, model.encoder)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name][: len(weight)], weight)


def test_loading_leaves_randomness_alone(model, tmp_path):
    model.save(tmp_path / "model")
    model.set_heads(model.head_specs[:1])
    model.save(tmp_path / "scgpt", format="scgpt")
    before = torch.random.get_rng_state()
    models.load(tmp_path / "model")
    models.load(tmp_path / "scgpt", family="scgpt")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_save_that_fails_leaves_the_old_folder(model, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    old = model.hash()
    model.gene_embedding.weight.data += 1
    model.history = pd.DataFrame({"step": [object()]})  # no JSON
    with pytest.raises(TypeError, match="not JSON serializable"):
        model.save(tmp_path / "model")
    assert models.load(tmp_path / "model").hash() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_put_in_place_leaves_the_old_one(model, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    old, rename = model.hash(), Path.rename
    model.gene_embedding.weight.data += 1

    def full(path, target):
        if (path / "config.json").exists() and path.parent == target.parent and path.name != "model":
            raise OSError("no room for another entry")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no room"):
        model.save(tmp_path / "model")
    assert models.load(tmp_path / "model").hash() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("n_bytes", [0, 4, 300])
def test_truncated_weights_are_named(model, tmp_path, n_bytes):
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(ValueError, match=naming("weights.safetensors", "damaged")):
        models.load(tmp_path / "model")


def test_a_checkpoint_that_holds_no_weights_is_an_error(tmp_path):
    torch.save([1, 2], tmp_path / "best_model.pt")
    with pytest.raises(ValueError, match=naming("best_model.pt", "list", "dictionary")):
        storage.read_torch(tmp_path / "best_model.pt")
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "missing.pt", "checkpoint")):
        storage.read_torch(tmp_path / "missing.pt")


def test_a_family_of_another_package_is_imported_only_when_asked_for(model, tmp_path):
    model.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"family": "antigravity.model"}))
    with pytest.raises(ValueError, match=naming("family='antigravity.model'")):
        models.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("options", "error", "values"),
    [
        ({"family": "scbart"}, ValueError, ("family", "'scbart'", "'scgpt'")),
        ({"size": "huge"}, ValueError, ("size", "'huge'", "['base', 'small', 'tiny']", "scgpt")),
        ({"depth": 3}, TypeError, ("'depth'", "scgpt", "'n_heads'")),
        ({"n_heads": 7}, ValueError, ("d_model=512", "n_heads=7")),
    ],
)
def test_models_that_cannot_be_built_are_an_error(options, error, values):
    with pytest.raises(error, match=naming(*values)):
        models.build(**{"family": "scgpt", "vocab": ["a"]} | options)


def test_a_folder_that_holds_no_model_says_what_was_expected(model, tmp_path):
    with pytest.raises(ValueError, match=naming(tmp_path, "family=", "'scgpt'")):
        models.load(tmp_path)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=naming("format", "'geneformer'", "'native'", "'scgpt'")):
        model.save(tmp_path / "other", format="geneformer")


def test_a_folder_of_other_files_is_never_replaced(model, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=naming("precious", "first: 'thesis.txt'")):
        model.save(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ValueError, match=naming("first: 'thesis.txt'")):
        model.save(tmp_path / "precious" / "thesis.txt")
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")
    assert models.load(tmp_path / "model").hash() == model.hash()


def test_a_prefix_to_ignore_is_one_name_and_not_its_letters(model, tmp_path):
    model.save(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "weights.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith("layers.")}
    save_file(kept, tmp_path / "model" / "weights.safetensors")
    with pytest.raises(ValueError, match=r"missing: layers\.0"):
        models.load(tmp_path / "model", ignore="decoder.0.weight")
    assert models.load(tmp_path / "model", ignore="layers.").n_parameters == model.n_parameters


def test_a_repository_that_cannot_be_fetched_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=naming("hf://nobody/nothing", "folder")):
        models.load("hf://nobody/nothing")
    with pytest.raises(FileNotFoundError, match=naming("hf://no//name")):
        models.load("hf://no//name")
