"""Micro-batches by tokens, and memory that runs out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from engine.faults import search_path
from engine.runs import assert_same_curve, curve, pretrain, start
from messages import naming

from scllm import models
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.engine.memory import longest, micro_batches
from scllm.engine.objectives import objective_from_dict
from scllm.engine.predict import predict
from scllm.engine.run import Run

PLAIN = {"epochs": 2, "dropout": 0.0}


def batch_of(adata, model, n_cells=6, **options):
    source = open_source(adata)
    match = genes.match(source.genes, model.vocab)
    loader = Loader(source, np.arange(n_cells), match, model.encoder, model.vocab, n_cells, **options)
    return next(loader.epoch(0))[0]


@pytest.mark.parametrize("n_tokens", [1, 25, 60, 10_000, float("inf")])
def test_micro_batches_hold_all_cells_in_order_and_no_more_tokens_than_allowed(toy, model, n_tokens):
    batch = batch_of(toy, model, obs={"batch": np.arange(toy.n_obs)})
    parts = list(micro_batches(batch, n_tokens))
    for part in parts:
        assert part.n_cells == 1 or len(part.genes) <= n_tokens
        assert part.cu_seqlens.diff().tolist() == list(part.lengths)
    for name in ("genes", "values", "keys"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.cat([part.obs["batch"] for part in parts]).tolist() == batch.obs["batch"].tolist()
    assert sum((part.lengths for part in parts), ()) == batch.lengths
    # no two neighbours would have fitted into one
    for one, other in pairwise(parts):
        assert len(one.genes) + other.lengths[0] > n_tokens


@pytest.mark.parametrize("family", sorted(set(models.families()) - {"spatial"}))
def test_memory_is_tried_with_cells_that_are_as_long_as_possible(toy, family):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build(family, vocab=toy.var_names, size="tiny")
    objective = objective_from_dict(model.config.objective())
    whole = getattr(objective, "predicts_whole_cells", False)
    batch = batch_of(toy, model, keep_whole=whole)
    length = min(model.encoder.max_len, len(model.vocab) + model.encoder.n_specials)
    tried = longest(batch, 3, length)
    assert tried.lengths == (length,) * 3
    loss = objective(model, tried, 0)
    loss.sum.backward()
    assert loss.count > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_limit_of_tokens_does_not_change_the_curve(toy, tmp_path, strategy):
    pretrain(toy, tmp_path / "whole", **PLAIN)
    pretrain(toy, tmp_path / "cut", n_procs=2, config={"max_tokens": 60, "strategy": strategy}, **PLAIN)
    assert_same_curve(curve(tmp_path / "cut"), curve(tmp_path / "whole"))


@pytest.mark.parametrize("n_procs", [1, 2])
def test_training_goes_on_with_smaller_micro_batches_when_memory_runs_out(toy, tmp_path, n_procs):
    pretrain(toy, tmp_path / "whole", **PLAIN)
    run_dir = tmp_path / "run"
    environment = {"FAULT": f"memory:100:0:{tmp_path}", "PYTHONPATH": search_path()}
    process = start(run_dir, n_procs=n_procs, environment=environment, model="engine.faulty", **PLAIN)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "emory ran out" in output
    assert "same batch_size" in output
    assert Run(run_dir).is_done
    assert int(Run(run_dir).max_tokens.read_text()) <= 100
    assert_same_curve(curve(run_dir), curve(tmp_path / "whole"))


def test_a_cell_that_does_not_fit_is_an_error_that_says_what_to_do(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", f"memory:1:0:{tmp_path}")
    with pytest.raises(RuntimeError, match=naming("one cell", "checkpointing=True", "max_len")):
        pretrain(toy, tmp_path / "run", model="engine.faulty", **PLAIN)


def test_prediction_goes_on_with_fewer_cells_when_memory_runs_out(toy, model):
    source = open_source(toy)
    match = genes.match(source.genes, model.vocab)

    def embed(replica, batch):
        return replica.embed(batch)

    def embed_few(replica, batch):
        if batch.n_cells > 7:
            torch.empty(1 << 60)  # more than any machine has
        return replica.embed(batch)

    whole, found = (
        torch.cat([part for _, part in predict(model, source, match, forward, device="cpu")])
        for forward in (embed, embed_few)
    )
    torch.testing.assert_close(found, whole)
