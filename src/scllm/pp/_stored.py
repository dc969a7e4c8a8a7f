"""The matrix to work on, as CSR with sorted columns and without stored zeros."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from scipy import sparse

from scllm._typing import CSR
from scllm.data.cells import CellSource
from scllm.data.checks import read_checked
from scllm.data.value_kind import as_counts

__all__ = ["stored_rows"]


def stored_rows(adata: AnnData, source: CellSource, layer: str | None) -> CSR:
    """Return the layer itself if it is canonical CSR without stored zeros, or else read it in row chunks.

    Floating-point noise of counts is removed.
    """
    stored = adata.layers.get(layer) if layer is not None else None if adata.isbacked else adata.X
    if sparse.issparse(stored) and stored.format == "csr" and stored.has_canonical_format and stored.data.all():
        return as_counts(stored)
    step = 4096
    rows = (np.arange(start, min(start + step, source.n_obs)) for start in range(0, source.n_obs, step))
    matrix = sparse.csr_matrix(sparse.vstack([read_checked(source, chunk) for chunk in rows], format="csr"))
    matrix.eliminate_zeros()
    return matrix
