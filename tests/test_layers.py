"""Layers that verbs write are theirs alone: changing the input in place leaves them as they are."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from scllm import models, pp, tl


@pytest.fixture
def written(adata):
    """`adata` with everything sparse that verbs write."""
    model = models.build("scgpt", vocab=adata.var_names, size="tiny", n_layers=1)
    adata.layers["counts"] = adata.X.copy()
    pp.bin_expression(adata)
    pp.bin_expression(adata, layer="counts", key_added="again")
    pp.rank_expression(adata)
    pp.tokenize(adata)
    pp.tokenize(adata, encoder="ranks", key_added="ranks")
    tl.reconstruct(adata, model)
    tl.reconstruct(adata, model, mask_ratio=0.5, key_added="hidden")
    return adata


def test_no_sparse_matrix_shares_memory_with_another(written):
    places = {"X": written.X, **dict(written.layers), **dict(written.obsm)}
    found = {name: matrix for name, matrix in places.items() if sparse.issparse(matrix)}
    assert len(found) == 12
    arrays = ("data", "indices", "indptr")
    for (one, a), (other, b) in combinations(found.items(), 2):
        for name in arrays:
            for also in arrays:
                assert not np.shares_memory(getattr(a, name), getattr(b, also)), (one, name, other, also)


def test_downsampling_the_input_leaves_layers_as_they_are(written):
    before = {name: layer.toarray() for name, layer in written.layers.items()}
    sc.pp.downsample_counts(written, counts_per_cell=20, random_state=0)
    written.X.data[:] = 0
    written.X.indices[:] = 0
    for name, layer in written.layers.items():
        np.testing.assert_array_equal(layer.toarray(), before[name], err_msg=name)


def test_a_recipe_gives_layers_of_their_own(adata):
    pp.recipe_scgpt(adata, n_top_genes=20, min_gene_counts=1)
    for (_, a), (_, b) in combinations({"X": adata.X, **dict(adata.layers)}.items(), 2):
        for name in ("data", "indices", "indptr"):
            assert not np.shares_memory(getattr(a, name), getattr(b, name))
