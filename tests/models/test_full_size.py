"""Published architectures at their full size: one cell goes through in bounded memory.

`python -m benchmarks.full_size` sends the longest cell through all of them.
"""

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

model = models.build(sys.argv[1], size=sys.argv[2], vocab=[f"g{i}" for i in range(int(sys.argv[3]))]).eval()
counts = Tokens(np.array([0, 2000]), np.arange(0, 16_000, 8, dtype=np.int32), np.ones(2000, np.float32))
batch = Batch.from_tokens(model.encoder(counts, model.vocab, measured=model.vocab.gene_ids))
with torch.inference_mode():
    outputs = model(batch)
assert outputs.cell.isfinite().all()
assert all(value.isfinite().all() for value in outputs.heads.values())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "size", "n_genes"),
    [
        ("scgpt", "base", 60_694),
        ("scbert", "base", 16_906),
        ("scfoundation", "base", 19_264),
        ("geneformer", "v2-316m", 20_271),
    ],
)
def test_a_cell_of_the_published_size_fits_into_24_gib(family, size, n_genes):
    run = subprocess.run(
        [sys.executable, "-c", CELL, family, size, str(n_genes)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 24
