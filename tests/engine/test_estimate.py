"""Estimated operations of a forward pass, compared with those that torch counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scllm import models
from scllm.data.tokens import Tokens
from scllm.engine.estimate import flops_per_cell
from scllm.models.base import Batch


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
