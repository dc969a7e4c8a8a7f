"""Published folders that are damaged, named otherwise or wrapped: read by name, or refused with what is there."""

from __future__ import annotations

import json
import re

import pytest
import torch

from scllm import models
from scllm.models import storage

GENES = [f"gene_{i}" for i in range(12)]


@pytest.fixture(scope="module")
def tiny():
    return models.build("scgpt", vocab=models.Vocab.from_genes(GENES), size="tiny", n_layers=2)


@pytest.fixture
def folder(tiny, tmp_path):
    """A folder in scGPT's format."""
    tiny.save(tmp_path / "scgpt", format="scgpt")
    return tmp_path / "scgpt"


@pytest.fixture(scope="module")
def parity(shared):
    return shared / "parity"


def with_args(folder, **changes) -> None:
    args = json.loads((folder / "args.json").read_text()) | changes
    (folder / "args.json").write_text(json.dumps({name: value for name, value in args.items() if value is not None}))


@pytest.mark.parametrize("text", ["", '{"nlayers": 2', "[1, 2]", "null"])
def test_damaged_settings_are_named(folder, text):
    (folder / "args.json").write_text(text)
    with pytest.raises(ValueError, match=r"args\.json"):
        models.load(folder, family="scgpt")


def test_settings_under_other_names_are_said_with_their_values(folder):
    with_args(folder, nheads=None, embsize=None, d_hid=None, nhead=2, layer_size=64)
    message = r"'embsize', 'd_hid' are missing|'nheads', 'embsize', 'd_hid' are missing"
    with pytest.raises(ValueError, match=message) as caught:
        models.load(folder, family="scgpt")
    said = str(caught.value)
    assert str(folder / "args.json") in said
    for seen in (
        "'nheads' may be 'nhead' (2)",
        "'embsize' may be 'layer_size' (64)",
        "'d_hid' may be 'layer_size' (64)",
    ):
        assert seen in said


def test_a_missing_setting_is_named_with_what_is_there(folder):
    with_args(folder, nlayers=None)
    with pytest.raises(ValueError, match=r"'nlayers' is missing.*There is 'embsize', 'nheads'") as caught:
        models.load(folder, family="scgpt")
    assert str(folder / "args.json") in str(caught.value)


@pytest.mark.parametrize("value", ["12", 1.5, True, [2]])
def test_a_setting_of_another_type_is_named(folder, value):
    with_args(folder, nheads=value)
    with pytest.raises(ValueError, match=rf"'nheads' in .*args\.json .*got {re.escape(repr(value))}"):
        models.load(folder, family="scgpt")


WRAPPED = {
    "as they are": lambda weights: weights,
    "in a training script's dictionary": lambda weights: {"epoch": 3, "model_state_dict": weights, "optimizer": {}},
    "of Lightning": lambda weights: {"state_dict": weights, "lr": 0.1},
    "compiled": lambda weights: {f"_orig_mod.{name}": tensor for name, tensor in weights.items()},
    "of several GPUs": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "compiled on several GPUs": lambda weights: {
        "model_state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    },
    "with compiled layers": lambda weights: {
        re.sub(r"(layers?\.\d+)\.", r"\1._orig_mod.", name): tensor for name, tensor in weights.items()
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_unwrapped_by_name(tiny, folder, kind):
    weights = storage.read_torch(folder / "best_model.pt")
    torch.save(WRAPPED[kind](weights), folder / "best_model.pt")
    found = models.load(folder, family="scgpt").state_dict()
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(found[name][: len(tensor)], tensor), name


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_of_other_families_are_unwrapped_too(parity, tmp_path, kind):
    file = parity / "geneformer" / "model_v2"
    (tmp_path / "config.json").write_text((file / "config.json").read_text())
    plain = models.geneformer_files._weights(file)
    torch.save(WRAPPED[kind](plain), tmp_path / "pytorch_model.bin")
    found = models.geneformer_files._weights(tmp_path)
    assert set(found) == set(plain)


def test_what_is_no_dictionary_of_weights_is_said(folder):
    torch.save({"weights": [1, 2], "epoch": 3}, folder / "best_model.pt")
    with pytest.raises(ValueError, match=r"best_model\.pt, but 'weights' is a list. There is 'weights', 'epoch'"):
        models.load(folder, family="scgpt")


def test_settings_that_geneformer_lacks_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))
    with pytest.raises(
        ValueError, match=r"config\.json, but 'num_hidden_layers'.*There is 'model_type', 'hidden_size'"
    ):
        models.load(tmp_path, family="geneformer")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        models.load(tmp_path, family="geneformer")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cell": {"state_dict": {}}}, r"'config' is missing.*There is 'state_dict'"),
        ({"cell": {"state_dict": {}, "config": {"model": "mae"}}}, "'model_config' is missing"),
        ({"cell": {"state_dict": {}, "config": {"model": "mae", "model_config": {"other": {}}}}}, "'mae' is missing"),
        (
            {"cell": {"state_dict": {}, "config": {"model": "mae", "model_config": {"mae": {"encoder": {}}}}}},
            r"'decoder', 'bin_num', .* are missing",
        ),
    ],
)
def test_settings_that_scfoundation_lacks_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "models.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        models.load(tmp_path, family="scfoundation", vocab=models.Vocab.from_genes(GENES))
    assert "models.ckpt" in str(caught.value)
