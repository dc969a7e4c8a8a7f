"""Row 3: batches from counts in memory, compared with AnnLoader and a collate function in numpy."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
from scipy import sparse

from benchmarks._cells import loader, serial_epoch, table
from benchmarks._others import ann_batches, collate
from benchmarks._timing import Row, copy_rate, paired
from benchmarks.row01_binning import N_GENES, N_STORED, counts
from scllm.kernels.draws import mix

N_CELLS, N_CELLS_THEIRS, BATCH = 8_000, 640, 64
TARGET_RATIO, TARGET_RATE = 6, 25_000


def run() -> Row:
    indptr, indices, data = counts(N_CELLS)
    adata = table(sparse.csr_matrix((data, indices, indptr), shape=(N_CELLS, N_GENES)))
    cells = loader(adata, batch_size=BATCH)
    _check(adata, cells)
    n_theirs = N_CELLS_THEIRS // BATCH

    def theirs(n_bins: int | None = 51) -> None:
        for dense in ann_batches(adata, BATCH, n_theirs):
            collate(dense, n_bins=n_bins)

    def threaded() -> None:
        for _ in cells.epoch(1):
            pass

    against = partial(paired, n_ours=N_CELLS, n_theirs=N_CELLS_THEIRS)
    ours = partial(serial_epoch, cells)
    ours(), theirs()
    ratio, binned_before = against(ours, theirs), against(ours, lambda: theirs(None), rounds=5)
    prefetching = against(threaded, theirs, rounds=5, clock=time.process_time)
    rate, rate_prefetching = (1 / float(np.median(found.ours)) for found in (ratio, prefetching))
    share = rate * N_STORED * 2 * (data.itemsize + indices.itemsize) / copy_rate()
    return Row(
        number=3,
        what="Loader, CSR in memory, 2,000 non-zeros per cell, binned, truncated to 1,201, packed, batches of 64",
        beside="AnnLoader and numpy collate (np.quantile and np.searchsorted for each cell)",
        ratio=str(ratio),
        absolute=f"{rate:,.0f} cells/s/core, {rate_prefetching:,.0f} with the prefetch thread; "
        f"{binned_before.median:.3g}x without their binning",
        share_of_roof=f"{share:.0%} of memory copy",
        target=f">= {TARGET_RATIO}x, >= {TARGET_RATE:,} cells/s/core",
        is_met=ratio.median >= TARGET_RATIO and rate >= TARGET_RATE,
    )


def _check(adata, cells) -> None:
    """Compare the first batch with that of the numpy collate, for the same random subset of genes."""
    batch = next(cells.epoch(0))[0]
    rows = next(cells._plan(0)).rows
    expected = collate(adata.X[rows].toarray(), keys=mix(cells.seed, 0, rows))
    for found, wanted in zip((batch.genes, batch.values, batch.cu_seqlens), expected, strict=True):
        np.testing.assert_array_equal(found.numpy(), wanted.numpy())
