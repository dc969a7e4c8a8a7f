"""Fixtures for all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

os.environ.setdefault("MPLBACKEND", "agg")
# before torch is imported; matrices are small here: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _same_weights_in_any_order() -> None:
    """Fresh models of a test are the same whatever ran before it, and so is the number of threads.

    The first parallel numba code of a process, such as that of umap, would raise the latter.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _figures_are_closed():
    """matplotlib keeps every figure of pyplot until it is closed, and warns of the twenty-first."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of real data and of outputs of the original implementations."""
    path = Path(os.environ.get("SCLLM_SHARED") or Path(__file__).parents[2] / "shared")
    if path.is_dir():
        return path
    message = f"no fixtures in {path}: set SCLLM_SHARED to the directory that holds them"
    if os.environ.get("SCLLM_REQUIRE_SHARED") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def _planted() -> AnnData:
    """60 cells by 40 genes of counts; see `adata`."""
    rng = np.random.default_rng(0)
    n_cells, n_genes = 60, 40
    is_b = np.arange(n_cells) % 2 == 1
    in_second_batch = np.arange(n_cells) % 4 >= 2
    rate = np.full((n_cells, n_genes), 0.5)
    # each type has ten genes of its own
    rate[~is_b, :10] = 6.0
    rate[is_b, 10:20] = 6.0
    # the programme: gene_20 drives gene_21 to gene_25, in either type
    activity = rng.gamma(2.0, 2.0, n_cells)
    rate[:, 20:26] = activity[:, None]
    rate[in_second_batch, 30:35] *= 6.0
    depth = rng.uniform(0.7, 1.3, n_cells)
    counts = rng.poisson(rate * depth[:, None]).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.where(is_b, "B", "A")),
            "batch": pd.Categorical(np.where(in_second_batch, "second", "first")),
        },
        index=[f"cell_{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(n_genes)])
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture
def adata(_planted: AnnData) -> AnnData:
    """Counts (CSR float32) of 60 cells by 40 genes with `obs["cell_type"]` (A, B) and `obs["batch"]` (first, second).

    gene_0 to gene_9 mark A, gene_10 to gene_19 mark B, gene_20 drives gene_21 to gene_25 in either type, and gene_30 to
    gene_34 differ between the batches, which cross the types.
    """
    return _planted.copy()
