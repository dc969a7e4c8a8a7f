"""Low-rank adapters."""

from __future__ import annotations

import pytest
import torch
from messages import naming

from scllm import datasets, models, tl

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:torch.*", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.fixture(scope="module")
def cells():
    return datasets.toy(n_cells=120)


@pytest.fixture(scope="module")
def model(cells):
    return models.build("scgpt", vocab=list(cells.var_names), size="tiny")


def tuned(cells, model, run_dir, **options):
    config = tl.TrainConfig(lr=1e-2)
    return tl.finetune(cells, model, key="cell_type", epochs=1, validation=0, run_dir=run_dir, config=config, **options)


def test_frozen_blocks_get_no_adapters(cells, model, tmp_path):
    before, after = model.state_dict(), tuned(cells, model, tmp_path / "run", lora=2, freeze=1).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("layers.1.") for name in changed)
    with pytest.raises(TypeError, match=naming("lora", "freeze='encoder'")):
        tuned(cells, model, tmp_path / "other", lora=2, freeze="encoder")
    assert not (tmp_path / "other").exists()


def test_frozen_blocks_without_layers_to_adapt_are_an_error_before_anything_is_written(cells, model, tmp_path):
    with pytest.raises(ValueError, match=naming("lora=", "all", "frozen")):
        tuned(cells, model, tmp_path / "run", lora=2, freeze=2)
    cells.var["marker"] = [i < 20 for i in range(cells.n_vars)]
    with pytest.raises(ValueError, match=naming("lora=", "all", "frozen")):
        tl.classify_genes(cells, model, labels="marker", lora=2, freeze=2, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_have_a_dropout_of_their_own(cells, model, tmp_path):
    without, with_dropout = (
        tuned(cells, model, tmp_path / str(p), lora=tl.LoraSettings(r=2, dropout=p)).history["loss"] for p in (0.0, 0.5)
    )
    assert without.iloc[0] == with_dropout.iloc[0]  # the initial output of adapters is zero
    assert without.iloc[-1] != with_dropout.iloc[-1]


def test_a_configuration_of_peft_is_accepted_if_it_sets_nothing_else(cells, model, tmp_path):
    from peft import LoraConfig

    given = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, task_type="SEQ_CLS")
    same = tl.LoraSettings(r=2, alpha=4, dropout=0.1)
    hashes = [tuned(cells, model, tmp_path / str(i), lora=lora).hash() for i, lora in enumerate((given, same))]
    assert hashes[0] == hashes[1]
    with pytest.raises(ValueError, match=naming("use_rslora=True", "r, lora_alpha, lora_dropout")):
        tuned(cells, model, tmp_path / "other", lora=LoraConfig(r=2, use_rslora=True))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": 0}, ["rank", "0"]),
        ({"r": "8"}, ["rank", "'8'"]),
        ({"alpha": 0}, ["alpha", "got 0"]),
        ({"dropout": 2}, ["dropout", "2"]),
    ],
)
def test_invalid_settings_of_adapters_are_an_error_that_names_them(options, named):
    with pytest.raises(ValueError, match=naming("lora", *named)):
        tl.LoraSettings(**options)


def test_initial_adapters_do_not_depend_on_earlier_random_numbers(cells, model, tmp_path):
    hashes = []
    for name in "ab":
        torch.rand(3)
        state = torch.get_rng_state()
        hashes.append(tuned(cells, model, tmp_path / name, lora=2).hash())
        assert torch.equal(torch.get_rng_state(), state)
    assert hashes[0] == hashes[1]


def test_lora_changes_only_heads_and_linear_weights_of_the_blocks(cells, model, tmp_path):
    before, after = model.state_dict(), tuned(cells, model, tmp_path / "run", lora=4).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = ("attention.qkv.weight", "attention.out.weight", "up.weight", "down.weight")
    assert changed == {name for name in before if name.startswith("layers.") and name.endswith(linear)}
    assert set(after) - set(before) == {name for name in after if name.startswith("heads.")}


def test_adapters_are_merged_exactly(tmp_path):
    from scllm.engine.lora import LoraSettings, add_adapters, merge_adapters

    cells = datasets.toy(n_cells=30)
    model = models.build("scgpt", vocab=list(cells.var_names), size="tiny").eval()
    add_adapters(model, LoraSettings(r=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    tl.embed(cells, model, key_added="adapted")
    merge_adapters(model)
    tl.embed(cells, model, key_added="merged")
    torch.testing.assert_close(
        torch.tensor(cells.obsm["merged"]), torch.tensor(cells.obsm["adapted"]), atol=1e-5, rtol=1e-4
    )
    assert not any("lora" in name for name in model.state_dict())
