"""Row 4: random epochs from a gzip h5ad, compared with AnnLoader and scDataset."""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
from anndata import AnnData, read_h5ad
from scipy import sparse

from benchmarks._cells import blood, loader, serial_epoch, table
from benchmarks._others import ann_batches, block_batches, collate
from benchmarks._timing import Ratio, Row, paired

try:
    from scdataset import BlockShuffling, scDataset
except ImportError:  # pip install --no-deps scdataset
    scDataset = None

COPIES, BATCH, FETCH = 6, 64, 64
N_ANNLOADER = 256
TARGET_RATIO, TARGET_BLOCKS, TARGET_SHARE = 6, 1.5, 0.45


def run() -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.h5ad"
        adata = blood()
        table(sparse.vstack([adata.X] * COPIES, format="csr"), adata.var_names).write_h5ad(path, compression="gzip")
        return _row(str(path))


def _row(path: str) -> Row:
    cells, backed = loader(path, batch_size=BATCH), read_h5ad(path, backed="r")
    n_cells, n_blocks = backed.n_obs, FETCH * BATCH
    np.testing.assert_array_equal(
        cells.source.read(np.arange(500)[::-1]).toarray(), backed[np.arange(500)].to_memory().X.toarray()[::-1]
    )
    ours, serial = partial(serial_epoch, cells), partial(_sequential, path)
    assert sum(ours()) == n_cells

    def ann() -> None:
        for dense in ann_batches(backed, BATCH, N_ANNLOADER // BATCH):
            collate(dense)

    def blocks(batches=block_batches, n_bins: int | None = 51) -> None:
        for dense in batches(backed, BATCH, FETCH):
            collate(dense, n_bins=n_bins)

    beside = partial(paired, ours, n_ours=n_cells, rounds=5)
    ann(), blocks()
    ratio = beside(ann, n_theirs=N_ANNLOADER)
    by_blocks = beside(blocks, n_theirs=n_blocks)
    unbinned = beside(lambda: blocks(n_bins=None), n_theirs=n_blocks)
    package = None if scDataset is None else beside(lambda: blocks(_scdataset), n_theirs=n_blocks)
    sequential = beside(serial, n_theirs=n_cells)
    rate = 1 / float(np.median(ratio.ours))
    return Row(
        number=4,
        what=f"Loader, gzip h5ad of {n_cells:,} blood cells, binned, truncated, packed, random epoch",
        beside="AnnLoader, backed, and numpy collate; scDataset (block 16, fetch 64 batches) and the same collate",
        ratio=f"{ratio}; scDataset {_in_words(package)}; our own implementation of its sampling {by_blocks}, "
        f"without binning in the collate {unbinned}",
        absolute=f"{rate:,.0f} cells/s/core",
        share_of_roof=f"{sequential.median:.0%} of sequential reading",
        target=f">= {TARGET_RATIO}x, >= {TARGET_BLOCKS}x, >= {TARGET_SHARE:.0%} of sequential reading",
        is_met=ratio.median >= TARGET_RATIO
        and min(by_blocks.median, unbinned.median) >= TARGET_BLOCKS
        and sequential.median >= TARGET_SHARE,
    )


def _in_words(ratio: Ratio | None) -> str:
    return "not installed" if ratio is None else str(ratio)


def _sequential(path: str) -> None:
    """Read everything in file order with h5py."""
    with h5py.File(path) as file:
        for name in ("indices", "data"):
            array = file[f"X/{name}"]
            for start in range(0, len(array), 1 << 20):
                array[start : start + (1 << 20)]


def _scdataset(adata: AnnData, batch_size: int, n_batches: int):
    """Yield batches of the package itself on a backed AnnData; fetched rows stay sparse until a batch is made."""
    cells = scDataset(
        adata, BlockShuffling(block_size=16), batch_size=batch_size, fetch_factor=FETCH,
        fetch_callback=lambda data, rows: data[rows].to_memory().X,
        batch_callback=lambda fetched, rows: fetched[rows].toarray(),
    )  # fmt: skip
    yield from islice(cells, n_batches)
