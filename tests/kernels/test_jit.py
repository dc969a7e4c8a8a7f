"""Threads of kernels."""

from __future__ import annotations

import os
import subprocess
import sys


def test_starting_numba_threads_leaves_those_of_torch_alone() -> None:
    script = """
import numpy as np, torch
from scipy import sparse
from anndata import AnnData
import numba, scllm
counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (1000, 500)).astype("float32"))
scllm.pp.bin_expression(AnnData(counts))  # large enough for threads
print(torch.get_num_threads(), numba.threading_layer(), numba.get_num_threads())
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": "omp"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "omp", "2"]
