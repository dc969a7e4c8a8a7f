"""Published architectures at their full size: one cell goes through in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

CELL = """
import resource, sys
import numpy as np, torch
from scllm import models
from scllm.data.tokens import Tokens
from scllm.models.base import Batch

model = models.build(sys.argv[1], vocab=[f"g{i}" for i in range(int(sys.argv[2]))]).eval()
counts = Tokens(np.array([0, 2000]), np.arange(0, 16_000, 8, dtype=np.int32), np.ones(2000, np.float32))
batch = Batch.from_tokens(model.encoder(counts, model.vocab, measured=model.vocab.gene_ids))
with torch.inference_mode():
    outputs = model(batch)
assert all(value.isfinite().all() for value in outputs.heads.values())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("family", "n_genes"), [("scgpt", 60_694), ("scbert", 16_906), ("scfoundation", 19_264)])
def test_a_cell_of_the_published_size_fits_into_24_gib(family, n_genes):
    run = subprocess.run(
        [sys.executable, "-c", CELL, family, str(n_genes)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 24
