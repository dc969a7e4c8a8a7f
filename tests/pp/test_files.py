"""After each verb the data can be written, read back, and cut."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scllm import get, pp
from scllm.datasets import toy

VERBS = {
    "match_genes": lambda adata: pp.match_genes(adata, list(adata.var_names[5:])),
    "recipe_scgpt": lambda adata: pp.recipe_scgpt(adata, n_top_genes=20, batch_key="batch"),
    "bin_expression": pp.bin_expression,
    "tokenize": pp.tokenize,
    "split": lambda adata: pp.split(adata, group_key="batch", fractions=(0.5, 0.5)),
}


@pytest.mark.parametrize("extension", ["h5ad", "zarr"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_writes_survives_a_file(tmp_path, verb, extension):
    adata = toy(n_cells=60, n_genes=40)
    VERBS[verb](adata)
    path = tmp_path / f"a.{extension}"
    getattr(adata, f"write_{extension}")(path)
    back = getattr(ad, f"read_{extension}")(path)
    pd.testing.assert_frame_equal(back.obs, adata.obs)
    pd.testing.assert_frame_equal(back.var, adata.var)
    for name in [*adata.layers, *adata.obsm]:
        ours, theirs = ((x.layers if name in x.layers else x.obsm)[name] for x in (adata, back))
        assert (ours != theirs).nnz == 0
    ours, theirs = adata.uns["scllm"][verb], back.uns["scllm"][verb]
    assert set(ours["params"]) == set(theirs["params"])
    if "table" in ours:
        pd.testing.assert_frame_equal(theirs["table"].reset_index(drop=True), ours["table"], check_index_type=False)
    if verb == "tokenize":
        for a, b in zip(get.tokens(back, length=30), get.tokens(adata, length=30), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_writes_stays_valid_when_cells_and_genes_are_cut(tmp_path, verb):
    adata = toy(n_cells=60, n_genes=40)
    VERBS[verb](adata)
    part = adata[::2, 3:15].copy()
    part.write_h5ad(tmp_path / "part.h5ad")
    if verb == "tokenize":
        np.testing.assert_array_equal(get.tokens(part, length=30)[0], get.tokens(adata, length=30)[0][::2])
    VERBS["bin_expression"](part)
    assert part.layers["binned"].shape == part.shape
