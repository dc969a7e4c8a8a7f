"""Time ``tl.benchmark`` by number of cells: ``python -m benchmarks.scores``.

The embedding is synthetic: 20 overlapping clusters in 64 dimensions, four batches. The first call, which compiles
kernels, is not counted.
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm import tl

__all__ = ["cells", "seconds"]

N_CELLS = (10_000, 20_000, 50_000, 100_000)
N_CLASSES, N_BATCHES, WIDTH = 20, 4, 64


def cells(n_cells: int) -> AnnData:
    """Draw cells of several classes around their centres."""
    rng = np.random.default_rng(0)
    label = rng.integers(N_CLASSES, size=n_cells)
    values = rng.normal(size=(N_CLASSES, WIDTH))[label] + rng.normal(size=(n_cells, WIDTH)) * 1.5
    obs = {"cell_type": label.astype(str), "batch": rng.integers(N_BATCHES, size=n_cells).astype(str)}
    table = pd.DataFrame(obs, index=[str(i) for i in range(n_cells)]).astype("category")
    return AnnData(obs=table, obsm={"X_scllm": values.astype(np.float32)})


def seconds(adata: AnnData) -> float:
    """Return the CPU-seconds of scoring one embedding."""
    began = time.process_time()
    tl.benchmark(adata, use_rep="X_scllm", key="cell_type", batch_key="batch")
    return time.process_time() - began


def main() -> None:
    seconds(cells(N_CELLS[0]))
    print("| cells | CPU-seconds | per 10,000 cells |", "|---|---|---|", sep="\n", flush=True)
    for n_cells in N_CELLS:
        took = seconds(cells(n_cells))
        print(f"| {n_cells:,} | {took:.0f} | {took / n_cells * 1e4:.1f} |", flush=True)


if __name__ == "__main__":
    main()
