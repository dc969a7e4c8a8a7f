"""A small model for verbs that need one."""

from __future__ import annotations

import copy

import pytest
import torch

from scllm import models, settings
from scllm.models.base import CellModel


@pytest.fixture(scope="session")
def _tiny() -> CellModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_hidden": 16}
        return models.build("scgpt", vocab=[f"gene_{i}" for i in range(40)], **sizes).eval()


@pytest.fixture
def tiny(_tiny) -> CellModel:
    """A scGPT of two layers and width 16, untrained and never saved, over the genes of `adata`."""
    return copy.deepcopy(_tiny)


@pytest.fixture(autouse=True)
def _runs_go_to_a_temporary_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(settings, "run_dir", tmp_path / "runs")
