"""Estimated operations of a forward pass, compared with those that torch counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from scllm import models
from scllm.data import genes
from scllm.data.tokens import Tokens
from scllm.engine.estimate import flops_per_cell, matrix_rate, training_flops
from scllm.engine.lora import LoraSettings, add_adapters
from scllm.engine.objectives import Label, PermutedGene, objective_from_dict
from scllm.engine.optim import freeze
from scllm.engine.relational import COLUMN, relational_loss
from scllm.models.batch import Batch, Measured
from scllm.models.gene_lm import GeneLM
from scllm.models.heads import HeadSpec


@pytest.mark.parametrize("family", ["scgpt", "scbert", "scfoundation"])
def test_operations_per_cell_equal_those_counted_by_torch(family):
    model = models.build(family, vocab=[f"g{i}" for i in range(600)], size="small").eval()
    counts = Tokens(np.array([0, 250]), np.arange(250, dtype=np.int32), np.ones(250, np.float32))
    batch = Batch.from_tokens(model.encoder(counts, model.vocab, measured=model.vocab.gene_ids))
    # torch does not count the CPU's fused attention kernel, but it counts plain matrix products
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counted:
        model(batch)
    said = flops_per_cell(model, 250, training=False)
    assert said == pytest.approx(counted.get_total_flops(), rel=0.15)
    assert flops_per_cell(model, 250) == 3 * said


def _batch(model) -> Batch:
    """Three cells; transformers pads them, so those of its models have the same length."""
    lengths = [200, 200, 200] if isinstance(model, GeneLM) else [250, 100, 180]
    rng = np.random.default_rng(0)
    chosen = np.concatenate([np.sort(rng.choice(600, n, replace=False)) for n in lengths]).astype(np.int32)
    values = rng.integers(1, 9, len(chosen)).astype(np.float32)
    counts = Tokens(np.cumsum([0, *lengths]), chosen, values)
    tokens = model.encoder(counts, model.vocab, measured=model.vocab.gene_ids)
    match = genes.match(model.vocab.genes, model.vocab)
    measured = Measured.of(match, np.arange(3))
    return Batch.from_tokens(tokens, keys=np.arange(3), obs={"label:kind": np.array([0, 1, 0])}, measured=measured)


def _counted_by_torch(loss: Callable[[], torch.Tensor]) -> int:
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counted:
        loss().backward()
    return counted.get_total_flops()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("scgpt", {}),
        ("scgpt", {"left_out": 0.4}),
        ("scbert", {}),
        ("scfoundation", {}),
        ("geneformer", {}),
        ("gpt2", {}),
        ("albert", {}),
    ],
    ids=str,
)
def test_operations_of_a_training_step_equal_those_counted_by_torch(family, settings):
    model = models.build(family, vocab=[f"g{i}" for i in range(600)], size="small").train()
    objective, batch = objective_from_dict({**model.config.objective(), **settings}), _batch(model)
    count = training_flops(model, objective)
    # the head on all genes costs as much as such small blocks, and is not counted
    is_lm = isinstance(model, GeneLM)
    found = _counted_by_torch(lambda: model.hidden(batch).sum() if is_lm else objective(model, batch, 0).sum)
    assert count(batch) == pytest.approx(found, rel=0.15)
    # attention is over the length of each cell, not over the mean length
    longest, shortest = (count(batch.cells(i, i + 1)) / batch.lengths[i] for i in (0, 1))
    has_other_parts = family in ("scbert", "scfoundation")  # attention of linear cost, a decoder of constant cost
    assert longest > shortest or has_other_parts or batch.lengths[0] == batch.lengths[1]


def test_operations_of_the_view_of_each_cell_count_too():
    model = models.build("scgpt", vocab=[f"g{i}" for i in range(600)], size="small").train()
    objective, batch = objective_from_dict(model.config.objective()), _batch(model)
    batch = replace(batch, view=replace(batch, obs={COLUMN: torch.eye(3)}))
    found = _counted_by_torch(lambda: objective(model, batch, 0).sum + relational_loss(model, batch.view).sum)
    assert training_flops(model, objective)(batch) == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("what", [2, "encoder", "lora"])
def test_frozen_blocks_have_fewer_operations(what):
    model = models.build("scgpt", vocab=[f"g{i}" for i in range(600)], size="small").train()
    model.set_heads([HeadSpec("kind", ("a", "b"), pooling="ranked")])
    if what == "lora":
        add_adapters(model, LoraSettings(r=4), random_state=0)
    else:
        freeze(model, what)
    objective, batch = Label(), _batch(model)
    found = _counted_by_torch(lambda: objective(model, batch, 0).sum)
    assert training_flops(model, objective)(batch) == pytest.approx(found, rel=0.15)


def test_operations_that_cannot_be_counted_are_not_guessed():
    names = [f"g{i}" for i in range(60)]
    xlnet = models.build("xlnet", vocab=names, size="tiny")
    assert training_flops(xlnet, PermutedGene()) is None
    bert = models.build("gpt2", vocab=names, hf_config=BertConfig(hidden_size=16, num_attention_heads=2))
    assert training_flops(bert, objective_from_dict(bert.config.objective())) is None
    model = models.build("scgpt", vocab=names, size="tiny")
    model.set_heads([HeadSpec("kind", ("a", "b"), pooling="ranked", reads="inputs")])
    assert training_flops(model, Label()) is None


def test_the_rate_is_that_of_a_timed_matrix_product():
    device, a = torch.device("cpu"), torch.randn(512, 512)
    found = []
    for _ in range(3):
        began = time.process_time()
        for _ in range(20):
            a @ a
        found.append(20 * 2 * 512**3 / (time.process_time() - began))
    # of the wall clock, which runs while other processes have the cores, so the rate may be lower but not higher
    assert max(found) / 50 < matrix_rate.__wrapped__(device, "fp32") < 1.5 * max(found)
    before = torch.get_rng_state()
    assert matrix_rate(device, "bf16", 0.01) > 0
    assert torch.equal(torch.get_rng_state(), before)
