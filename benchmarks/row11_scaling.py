"""Row 11: tl.embed on a thousand to a million cells from disk, in constant memory and linear time."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from benchmarks._child import call_in_child, peak_rss
from benchmarks._timing import Row

SIZES = (1_000, 10_000, 100_000, 1_000_000)
N_GENES, N_STORED, BLOCK = 200, 20, 50_000
TARGET_MEMORY, TARGET_EXPONENT = 1.2, 0.05


def run() -> Row:
    with tempfile.TemporaryDirectory() as folder:
        warm = write_cells(Path(folder) / "warm.h5ad", 1_000)
        found = []
        for n_cells in SIZES:
            path = write_cells(Path(folder) / f"{n_cells}.h5ad", n_cells)
            found.append(call_in_child(embed_file, warm, path, str(Path(folder) / "out.zarr")))
    seconds, peaks = map(np.array, zip(*found, strict=True))
    exponent = float(np.polyfit(np.log(SIZES), np.log(seconds), 1)[0])
    growth = float(peaks[-1] / peaks[1])
    return Row(
        number=11,
        what=f"h5ad through loader and tl.embed (tiny), {SIZES[0]:,} to {SIZES[-1]:,} cells, streamed to zarr",
        beside="itself with fewer cells",
        ratio=f"peak RSS {growth:.3f}; time exponent {exponent:.3f}",
        absolute="; ".join(
            f"{n:,}: {peak / 2**20:.0f} MiB, {n / second:,.0f} cells/s"
            for n, peak, second in zip(SIZES, peaks, seconds, strict=True)
        ),
        share_of_roof=f"time per cell {seconds[-1] / SIZES[-1] / (seconds[1] / SIZES[1]):.2f} of that at {SIZES[1]:,}",
        target=f"RSS at 10^6 <= {TARGET_MEMORY} x at 10^4, exponent 1.00 +- {TARGET_EXPONENT}",
        is_met=growth <= TARGET_MEMORY and abs(exponent - 1) <= TARGET_EXPONENT,
    )


def write_cells(path: Path, n_cells: int) -> str:
    """Stream an h5ad of synthetic cells to disk."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        write_elem(file, "obs", pd.DataFrame(index=np.arange(n_cells).astype(str)))
        write_elem(file, "var", pd.DataFrame(index=[f"G{i}" for i in range(N_GENES)]))
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_cells, N_GENES)})
        group["indptr"] = np.arange(0, n_cells * N_STORED + 1, N_STORED)
        settings = {"shape": (n_cells * N_STORED,), "chunks": (16_384,), "compression": "gzip"}
        indices = group.create_dataset("indices", dtype=np.int32, **settings)
        data = group.create_dataset("data", dtype=np.float32, **settings)
        for start in range(0, n_cells, BLOCK):
            size = min(BLOCK, n_cells - start)
            genes = np.sort(np.argsort(rng.random((size, N_GENES)), axis=1)[:, :N_STORED], axis=1)
            part = slice(start * N_STORED, (start + size) * N_STORED)
            indices[part], data[part] = genes.ravel(), rng.geometric(0.6, size * N_STORED)
    return str(path)


def embed_file(warm: str, path: str, out: str) -> tuple[float, int]:
    """Measure CPU-seconds (without imports and compilation) and peak memory of embedding a file."""
    import torch

    from scllm import models, tl
    from scllm.data.vocab import Vocab

    torch.set_num_threads(1)
    model = models.build("scgpt", vocab=Vocab.from_genes(f"G{i}" for i in range(N_GENES)), size="tiny").eval()
    tl.embed(warm, model, device="cpu", out=out)
    start = time.process_time()
    tl.embed(path, model, device="cpu", out=out)
    return time.process_time() - start, peak_rss()
