"""The real cells are those recovered independently."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from messages import naming
from scipy import sparse

from scllm import datasets
from scllm.datasets import _pbmc


def test_counts_are_those_of_the_shared_file(shared) -> None:
    found = datasets.pbmc68k()
    expected = ad.read_h5ad(shared / "data" / "pbmc68k_reduced_counts.h5ad")
    assert (found.X != expected.X).nnz == 0
    assert found.obs_names.tolist() == expected.obs_names.tolist()
    assert found.var_names.tolist() == expected.var_names.tolist()
    assert found.obs["cell_type"].astype(str).tolist() == expected.obs["cell_type"].astype(str).tolist()
    assert found.obs["louvain"].astype(str).tolist() == expected.obs["louvain"].astype(str).tolist()


def test_pbmc_is_laid_out_as_promised(tmp_path) -> None:
    adata = datasets.pbmc68k()
    assert adata.shape == (700, 765)
    assert isinstance(adata.X, sparse.csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_sorted_indices
    assert adata.X.data.min() == 1
    assert adata.obs["cell_type"].cat.categories.size == 10
    assert adata.var["gene_symbol"].tolist() == adata.var_names.tolist()
    adata.write_h5ad(tmp_path / "pbmc.h5ad")


def test_values_that_are_no_counts_are_refused() -> None:
    exact = np.log1p(np.array([1, 2, 7]) / 2000 * 1e4)
    assert _pbmc._recover_counts(exact, np.full(3, 2000.0)).tolist() == [1, 2, 7]
    with pytest.raises(ValueError, match=naming(0.4, 0.1)):
        _pbmc._recover_counts(np.log1p(np.array([1, 2.4]) / 2000 * 1e4), np.full(2, 2000.0))
