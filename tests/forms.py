"""The same counts in every form that a matrix comes in, and with their genes in another order."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from scipy import sparse

from scllm.data.source import open_source

FORMS = {
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "dense": lambda matrix: sparse.csr_matrix(matrix).toarray(),
}


def stored_as(adata: AnnData, form: str) -> AnnData:
    """A copy whose X is stored in this form."""
    copied = adata.copy()
    copied.X = FORMS[form](copied.X)
    return copied


def rows_of(adata: AnnData) -> sparse.csr_matrix:
    """All rows as scllm reads them, whatever the form."""
    return open_source(adata).read(slice(None))


def by_name(adata: AnnData) -> AnnData:
    """The same cells, genes in the order of their names."""
    return adata[:, np.argsort(adata.var_names.to_numpy().astype(str))].copy()
