"""After each verb the data can be written, read back, and cut."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scllm.tl import classify, embed, embed_genes, finetune, pretrain, reconstruct


def tuned(adata, model):
    adata.obs["depth"] = np.asarray(adata.X.sum(1)).ravel()
    return finetune(adata, model, key=["cell_type", "depth"], epochs=1)


VERBS = {
    "embed": embed,
    "embed_genes": lambda adata, model: embed_genes(adata, model, groupby="cell_type"),
    "reconstruct": lambda adata, model: reconstruct(adata, model, mask_ratio=0.5),
    "pretrain": lambda adata, model: pretrain(adata, model, epochs=1),
    "finetune": tuned,
    "classify": lambda adata, model: classify(adata, tuned(adata, model), threshold=0.5),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_writes_survives_files_and_cuts(adata, tiny, tmp_path, verb):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories(["CD4+/CD25 T Reg", "B"])
    VERBS[verb](adata, tiny)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    for back in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        pd.testing.assert_frame_equal(back.obs, adata.obs)
        for where in ("obsm", "varm"):
            for key, values in getattr(adata, where).items():
                np.testing.assert_array_equal(getattr(back, where)[key], values)
        for key, layer in adata.layers.items():
            assert (layer != back.layers[key]).nnz == 0
        entry, expected = back.uns["scllm"][verb], adata.uns["scllm"][verb]
        assert set(entry["params"]) == set(expected["params"])
        if "table" in expected:
            pd.testing.assert_frame_equal(
                entry["table"].reset_index(drop=True), expected["table"], check_index_type=False
            )
        embed(back, key_added="again")  # the model is found again
    part = adata[::2, 5:35].copy()
    part.write_h5ad(tmp_path / "part.h5ad")
    assert all(values.shape[0] == 30 for values in [*part.obsm.values(), *part.varm.values()])
    embed(part, key_added="again")
