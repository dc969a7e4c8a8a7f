"""Reading one source in several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
from scipy import sparse

from scllm.data.cells import CellSource


def read_at_once(source: CellSource, requests: list[np.ndarray]) -> list[sparse.csr_matrix]:
    """Read rows in a thread for each request; all of them start at the same time."""
    start = Barrier(len(requests))

    def read(rows: np.ndarray) -> sparse.csr_matrix:
        start.wait()
        return source.read(rows)

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(read, requests))
