"""Example data: real cells, gene sets, and simulated cells with known structure."""

from __future__ import annotations

from scllm.datasets._census import census
from scllm.datasets._gene_sets import gene_set
from scllm.datasets._pancreas import pancreas
from scllm.datasets._pbmc import pbmc68k
from scllm.datasets._spatialdata import read_spatialdata
from scllm.datasets._toy import toy
from scllm.datasets._toy_spatial import toy_spatial
from scllm.datasets._visium import read_visium

__all__ = ["census", "gene_set", "pancreas", "pbmc68k", "read_spatialdata", "read_visium", "toy", "toy_spatial"]
