"""Row 10: memory that pp.bin_expression adds, compared with dense int64 bins."""

from __future__ import annotations

import tracemalloc

import numpy as np
from scipy import sparse

from benchmarks._cells import table
from benchmarks._child import call_in_child, peak_rss
from benchmarks._timing import Row
from benchmarks.row01_binning import N_GENES, N_STORED, counts

N_CELLS, TARGET = 16_000, 40


def run() -> Row:
    allocated, resident = call_in_child(added)
    dense = N_CELLS * N_GENES * np.dtype(np.int64).itemsize
    return Row(
        number=10,
        what=f"peak memory that pp.bin_expression adds, {N_GENES:,} genes, {N_STORED:,} non-zeros per cell",
        beside="dense int64 bins",
        ratio=f"1/{dense / allocated:.0f} allocated, 1/{dense / max(resident, 1):.0f} resident",
        absolute=f"{allocated / N_CELLS / 1e3:.2f} kB per cell, {resident / N_CELLS / 1e3:.2f} kB resident",
        share_of_roof=f"{N_STORED / (allocated / N_CELLS):.0%} of it is the bins themselves",
        target=f"<= 1/{TARGET}",
        is_met=max(allocated, resident) * TARGET <= dense,
    )


def added() -> tuple[int, int]:
    """Measure the peak of additional bytes: those allocated by numpy, and those resident according to the system."""
    from scllm import pp

    few = counts(200)
    pp.bin_expression(table(sparse.csr_matrix((few[2], few[1], few[0]), shape=(200, N_GENES))))  # to compile and import
    indptr, indices, data = counts(N_CELLS)
    adata = table(sparse.csr_matrix((data, indices, indptr), shape=(N_CELLS, N_GENES)))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak to the memory that is resident now
    before = peak_rss()
    tracemalloc.start()
    pp.bin_expression(adata)
    allocated = tracemalloc.get_traced_memory()[1]
    return allocated, peak_rss() - before
