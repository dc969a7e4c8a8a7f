"""What a forward pass is said to cost, against what torch counts."""

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
def test_operations_of_a_cell_are_those_that_torch_counts(family):
    model = models.build(family, vocab=[f"g{i}" for i in range(600)], size="small").eval()
    counts = Tokens(np.array([0, 250]), np.arange(250, dtype=np.int32), np.ones(250, np.float32))
    batch = Batch.from_tokens(model.encoder(counts, model.vocab, measured=model.vocab.gene_ids))
    # the fused attention kernel of the CPU is not counted, its plain products are
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counted:
        model(batch)
    said = flops_per_cell(model, 250, training=False)
    assert said == pytest.approx(counted.get_total_flops(), rel=0.15)
    assert flops_per_cell(model, 250) == 3 * said
