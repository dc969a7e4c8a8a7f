"""Cells for the benchmarks: real blood cells if they are in `SCLLM_SHARED`, otherwise synthetic cells."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad
from scipy import sparse

from scllm.data.encode import BinEncoder
from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.data.vocab import Vocab
from scllm.engine.loader import Loader

__all__ = ["CONTROL", "SHARED", "blood", "blood_1200", "loader", "made_cells", "screen", "serial_epoch", "table"]

SHARED = Path(os.environ.get("SCLLM_SHARED", "../shared")) / "data"
CONTROL = "non-targeting"


def screen(path: str) -> tuple[AnnData, AnnData]:
    """Read the cells of a CRISPR screen (Papalexi et al. 2021) with clean guides, and the control cells among them."""
    cells = read_h5ad(path)
    cells = cells[cells.obs["dominant_guide_fraction"] > 0.8].copy()
    return cells, cells[cells.obs["perturbation"] == CONTROL].copy()


def table(counts: sparse.csr_matrix, genes: pd.Index | None = None) -> AnnData:
    """Make an AnnData from a count matrix, with numbers as names of cells and genes."""
    names = pd.Index([f"G{i}" for i in range(counts.shape[1])]) if genes is None else genes
    return AnnData(counts, pd.DataFrame(index=np.arange(counts.shape[0]).astype(str)), pd.DataFrame(index=names))


def made_cells(n_cells: int, n_genes: int, n_stored: int, seed: int = 0) -> sparse.csr_matrix:
    """Make counts with a long tail, three quarters of them 1; cells have a log-normal number around ``n_stored``."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(n_stored), 0.5, n_cells), 1, n_genes).astype(int)
    indices = np.concatenate([np.sort(rng.choice(n_genes, n, replace=False, shuffle=False)) for n in lengths])
    data = 1 + np.floor(rng.pareto(1.5, len(indices))).clip(max=900)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return sparse.csr_matrix((data.astype(np.float32), indices.astype(np.int32), indptr), shape=(n_cells, n_genes))


@cache
def blood(name: str = "pbmc_zheng2017_facs") -> AnnData:
    """Read counts of 3,874 sorted blood cells by 16,791 genes, of which a cell expresses 714 on average."""
    path = SHARED / f"{name}.h5ad"
    return read_h5ad(path) if path.exists() else table(made_cells(3_874, 16_791, 714))


@cache
def blood_1200() -> AnnData:
    """Read blood cells from three 10x chemistries with the 1,200 most variable genes, of which a cell expresses 154."""
    if not (SHARED / "pbmc_10x_3batches.h5ad").exists():
        return table(made_cells(2_000, 1_200, 130))
    import scanpy as sc

    adata = blood("pbmc_10x_3batches")
    chosen = sc.pp.highly_variable_genes(adata, n_top_genes=1_200, flavor="seurat_v3", inplace=False)
    return table(sparse.csr_matrix(adata.X)[:, chosen["highly_variable"].to_numpy()])


def loader(data: AnnData | str, *, batch_size: int = 64, training: bool = True) -> Loader:
    """Make a loader of cells that are binned and truncated as in scGPT's training."""
    source = open_source(data)
    vocab = Vocab.from_genes(source.genes)
    rows = np.arange(source.n_obs)
    return Loader(source, rows, match(source.genes, vocab), BinEncoder(), vocab, batch_size, training=training)


def serial_epoch(cells: Loader, epoch: int = 0) -> list[int]:
    """Run one epoch without the prefetch threads, whose CPU-seconds are hard to attribute; return the batch sizes."""
    blocks = cells._read(cells._plan(epoch))
    return [batch.n_cells for block in blocks for parts in cells._encode(*block, epoch, 1) for batch in parts]
