"""Fixtures for the engine: small data, a small model, and a single thread, because tests share the cores."""

from __future__ import annotations

import pytest
import torch

import scllm


@pytest.fixture(scope="session")
def _toy():
    return scllm.datasets.toy(n_cells=120, n_genes=40)


@pytest.fixture
def toy(_toy):
    """120 cells by 40 genes."""
    return _toy.copy()


@pytest.fixture
def model(_toy):
    """An untrained scGPT with two narrow layers and dropout."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return scllm.models.build("scgpt", vocab=_toy.var_names, n_layers=2, n_heads=2, d_model=16, d_hidden=16)


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
