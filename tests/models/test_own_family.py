"""A family of another package, with its own block, encoder, objective and pooling, goes through everything."""

from __future__ import annotations

import importlib
import json
import os
import sys

import numpy as np
import pytest
import torch
from compressed import cosines
from engine.runs import assert_same_curve, curve, pretrain
from messages import naming

from scllm import datasets, models, tl
from scllm.data.encode import encoder_from_dict, encoder_to_dict
from scllm.engine.objectives import objective_from_dict, objective_to_dict
from scllm.models.entries import entries

FAMILY = "mylab.model"

ENCODE = '''
from dataclasses import dataclass

import numpy as np

from scllm.data.tokens import Tokens


@dataclass(frozen=True)
class ShareEncoder:
    """Each expressed gene with its share of the counts; long cells are truncated."""

    max_len: int = 64
    n_specials: int = 0
    needs_counts: bool = True

    @property
    def arrays(self):
        return {}

    def __call__(self, counts, vocab, keys=None, *, measured, random_state=0):
        values = np.asarray(counts.values, np.float32)
        cell = np.repeat(np.arange(len(counts)), counts.lengths)
        totals = np.bincount(cell, weights=values, minlength=len(counts))
        shares = (values / totals[cell]).astype(np.float32)
        place = np.arange(len(cell)) - np.repeat(counts.indptr[:-1], counts.lengths)
        kept = place < self.max_len
        indptr = np.concatenate([[0], np.cumsum(np.minimum(counts.lengths, self.max_len))])
        return Tokens(indptr, counts.genes[kept], shares[kept])
'''

TASK = '''
from dataclasses import dataclass

import torch

from scllm.engine.objectives.base import Loss, uniform


@dataclass(frozen=True)
class GuessShare:
    """Hide the shares of some genes and predict them."""

    mask_ratio: tuple[float, ...] = (0.5,)

    def __call__(self, model, batch, step):
        at = (uniform(batch.keys[batch.cell], batch.genes) < self.mask_ratio[0]).nonzero().squeeze(1)
        shown = batch.with_values(batch.values.index_fill(0, at, -1.0))
        guessed = model.guess(model.hidden(shown)[at])
        return Loss((guessed - batch.values[at]).square().sum(), torch.tensor(len(at), device=at.device))

    def logs(self, model):
        return ()

    def report(self, means, step):
        return means
'''

MODEL = '''
from dataclasses import dataclass

import torch
from torch import nn

from mylab.encode import ShareEncoder
from scllm.models.base import CellModel, ModelConfig, Outputs
from scllm.models.entries import entry
from scllm.models.pruning import BlockParts, Units, rows

SIZES = {"tiny": {"n_layers": 2, "n_heads": 4, "d_model": 32}, "base": {}}
PRETRAIN = {"epochs": 2, "batch_size": 16, "lr": 1e-3}
FINETUNE = {"epochs": 2, "batch_size": 16, "lr": 1e-3}


@dataclass(frozen=True)
class Config(ModelConfig):
    d_hidden: int = 64

    def objective(self):
        return {"kind": "mylab.task.GuessShare"}

    def encoder(self):
        return ShareEncoder()


class MeanBlock(nn.Module):
    """Adds the mean of gated features over the cell, then a feed-forward layer."""

    def __init__(self, d_model, n_heads, d_head, d_hidden):
        super().__init__()
        self.n_heads, self.checkpointing = n_heads, False
        self.norm = nn.LayerNorm(d_model)
        self.gate = nn.Linear(d_model, n_heads * d_head)
        self.back = nn.Linear(n_heads * d_head, d_model)
        self.wide = nn.Linear(d_model, d_hidden)
        self.narrow = nn.Linear(d_hidden, d_model)

    def forward(self, x, batch):
        gated = torch.sigmoid(self.gate(self.norm(x)))
        n = batch.cu_seqlens.diff().clamp(min=1)[:, None]
        mean = gated.new_zeros(batch.n_cells, gated.shape[1]).index_add(0, batch.cell, gated) / n
        x = x + self.back(gated * mean[batch.cell])
        return x + self.narrow(torch.relu(self.wide(x)))

    def parts(self):
        heads = Units((*rows(self.gate), (self.back, "weight", 1, 1)), self.n_heads)
        neurons = Units((*rows(self.wide), (self.narrow, "weight", 1, 1)), self.wide.out_features)
        return BlockParts(heads, neurons, ((self, "n_heads", 1),))


class Model(CellModel):
    family = "mylab.model"
    pooling = "sum"
    poolings = ("sum", "mean")
    head_pooling = "mean"

    def __init__(self, config, vocab, encoder):
        super().__init__(config, vocab, encoder)
        d = config.d_model
        self.genes = nn.Embedding(len(vocab), d)
        self.share = nn.Linear(1, d)
        self.layers = nn.ModuleList(
            MeanBlock(d, heads, d // config.n_heads, hidden) for heads, hidden in config.block_sizes()
        )
        self.guesses = nn.Linear(d, 1)

    @property
    def blocks(self):
        return list(self.layers)

    def inputs(self, batch):
        return self.genes(batch.genes) + self.share(batch.values[:, None])

    def gene_table(self):
        return self.genes.weight

    def forward(self, batch):
        hidden = self.hidden(batch)
        heads = {"value": self.guess(hidden)} | self.head_outputs_after(hidden, batch)
        return Outputs(hidden, self.pool(hidden, batch, "sum"), heads)

    @entry
    def guess(self, hidden):
        return self.guesses(hidden).squeeze(1)

    def pool(self, hidden, batch, pooling):
        if pooling == "sum":
            return hidden.new_zeros(batch.n_cells, hidden.shape[1]).index_add(0, batch.cell, hidden)
        return super().pool(hidden, batch, pooling)
'''


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    """The package, which this process and processes that it starts can import."""
    folder = tmp_path / "packages" / "mylab"
    folder.mkdir(parents=True)
    for name, text in (("__init__", ""), ("encode", ENCODE), ("task", TASK), ("model", MODEL)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")]))
    yield importlib.import_module(FAMILY)
    for name in [name for name in sys.modules if name.split(".")[0] == "mylab"]:
        del sys.modules[name]


@pytest.fixture
def cells():
    return datasets.toy(n_cells=80, n_genes=40)


@pytest.fixture
def model(mylab, cells):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return models.build(FAMILY, vocab=cells.var_names, size="tiny").eval()


def embedding(cells, model, **options):
    return tl.embed(cells, model, copy=True, device="cpu", **options).obsm["X_scllm"]


def test_it_is_pretrained_embeds_and_predicts_labels(mylab, cells, tmp_path):
    trained = pretrain(cells, tmp_path / "run", model=FAMILY, dropout=0.0)
    losses = trained.history.loc[trained.history["split"] == "train", "loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    found = embedding(cells, trained)
    assert found.shape == (80, 32)
    # its own pooling is the default, and adds what the library's takes the mean of
    lengths = np.diff(cells.X.indptr)
    np.testing.assert_allclose(
        found, embedding(cells, trained, pooling="mean") * lengths[:, None], rtol=1e-4, atol=1e-4
    )
    tuned = tl.finetune(cells, trained, key="cell_type", epochs=2, batch_size=16, device="cpu")
    tl.classify(cells, tuned)
    assert (cells.obs["scllm_label"].astype(str) == cells.obs["cell_type"].astype(str)).mean() > 0.5
    reloaded = models.load(tmp_path / "run", family=FAMILY)
    assert reloaded.hash() == trained.hash()


@pytest.mark.slow
def test_its_weights_are_sharded_over_two_processes(mylab, cells, tmp_path):
    pretrain(cells, tmp_path / "alone", model=FAMILY, dropout=0.0)
    pretrain(cells, tmp_path / "split", model=FAMILY, dropout=0.0, n_procs=2, config={"strategy": "fsdp"})
    assert_same_curve(curve(tmp_path / "split"), curve(tmp_path / "alone"))


def test_methods_of_the_package_gather_sharded_weights(model):
    assert {"guess", "hidden", "embed", "head_outputs"} <= set(entries(model))
    assert "pool" not in entries(model)


def test_it_is_quantised(model, cells, tmp_path):
    small = tl.quantize(model)
    assert small.layers[0].gate.weight_int8.dtype == torch.int8
    assert cosines(embedding(cells, small), embedding(cells, model)).min() > 0.99
    small.save(tmp_path / "model")
    assert models.load(tmp_path / "model", family=FAMILY).hash() == small.hash()


def test_heads_and_neurons_of_its_own_block_are_pruned(model, cells, tmp_path):
    small = tl.prune(model, amount=0.5, structured=True)
    assert sum(small.config.block_heads) == 4
    assert small.config.block_hidden == (32, 32)
    assert small.layers[0].n_heads == small.config.block_heads[0]
    assert small.layers[0].gate.out_features == 8 * small.config.block_heads[0]
    small.save(tmp_path / "model")
    again = models.load(tmp_path / "model", family=FAMILY)
    np.testing.assert_array_equal(embedding(cells, again), embedding(cells, small))
    sparse = tl.prune(model, amount=0.5, structured=False)
    assert (sparse.layers[1].wide.weight == 0).sum() == 32 * 64 // 2


def test_a_block_that_does_not_say_what_can_be_removed_is_an_error(mylab, model, monkeypatch):
    monkeypatch.delattr(mylab.MeanBlock, "parts")
    with pytest.raises(ValueError, match=naming("'MeanBlock'", "parts()", "structured=False")):
        tl.prune(model, amount=0.5, structured=True)


def test_a_saved_model_is_loaded_only_with_its_family_named(model, cells, tmp_path):
    model.save(tmp_path / "model")
    again = models.load(tmp_path / "model", family=FAMILY)
    assert (again.hash(), again.encoder) == (model.hash(), model.encoder)
    with pytest.raises(ValueError, match=naming(FAMILY, f"family={FAMILY!r}")):
        models.load(tmp_path / "model")


def test_no_file_makes_the_library_import_another_package(model, tmp_path):
    model.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    assert config["encoder"]["kind"] == "mylab.encode.ShareEncoder"
    config["encoder"] = {"kind": "antigravity.Flight"}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=naming("'antigravity.Flight'", FAMILY)):
        models.load(tmp_path / "model", family=FAMILY)
    assert "antigravity" not in sys.modules


def test_settings_name_the_classes_of_the_package(model, mylab):
    settings = objective_to_dict(objective_from_dict(model.config.objective(), FAMILY))
    assert settings == {"kind": "mylab.task.GuessShare", "mask_ratio": (0.5,)}
    saved = encoder_to_dict(model.encoder)
    assert encoder_from_dict(saved, family=FAMILY) == model.encoder
    for family in (None, "scgpt", "other.model"):
        with pytest.raises(ValueError, match=naming("'mylab.encode.ShareEncoder'", "pass that family")):
            encoder_from_dict(saved, family=family)
        with pytest.raises(ValueError, match=naming("'mylab.task.GuessShare'", "pass that family")):
            objective_from_dict(settings, family)
    with pytest.raises(ValueError, match=naming("'Missing'", "'mylab.task'")):
        objective_from_dict({"kind": "mylab.task.Missing"}, FAMILY)
    with pytest.raises(ValueError, match=naming("'Unknown'", "MaskedGene")):
        objective_from_dict({"kind": "Unknown"}, FAMILY)


def test_what_its_module_lacks_is_named(mylab, monkeypatch):
    monkeypatch.delattr(mylab, "FINETUNE")
    with pytest.raises(ValueError, match=naming(FAMILY, "FINETUNE is missing")):
        models.build(FAMILY, vocab=["a"])


def test_its_name_is_that_of_its_module(mylab, monkeypatch):
    monkeypatch.setattr(mylab.Model, "family", "mylab")
    with pytest.raises(ValueError, match=naming(FAMILY, "got 'mylab'")):
        models.build(FAMILY, vocab=["a"])


def test_a_pooling_that_is_declared_but_not_written_is_an_error(model, cells, monkeypatch):
    monkeypatch.setattr(type(model), "poolings", ("sum", "mean", "median"))
    with pytest.raises(ValueError, match=naming("'median'")):
        embedding(cells, model, pooling="median")
