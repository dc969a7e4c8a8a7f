"""Low-rank adapters."""

from __future__ import annotations

import pytest
import torch

from scllm import datasets, models, tl

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:torch.*", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


def test_lora_changes_linear_weights_of_the_blocks_and_heads_alone(tmp_path):
    cells = datasets.toy(n_cells=120)
    model = models.build("scgpt", vocab=list(cells.var_names), size="tiny")
    config = tl.TrainConfig(lr=1e-2)
    tuned = tl.finetune(
        cells, model, key="cell_type", lora=4, epochs=1, validation=0, run_dir=tmp_path / "run", config=config
    )
    before, after = model.state_dict(), tuned.state_dict()
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
