"""Measure what pretraining adds on 3,874 sorted blood cells: ``python -m benchmarks.study_blood RUN_DIR [EPOCHS]``.

Reads ``pbmc_zheng2017_facs.h5ad`` from ``SCLLM_SHARED`` and pretrains ``size="small"`` on all genes, which takes a
quarter of an hour on one CPU core for four epochs; an existing run is resumed. Embeddings from every layer are compared
with an SVD of the same genes and with the mean of the initial gene embeddings of each cell.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from sklearn.decomposition import TruncatedSVD

import scllm
from scllm.data.source import open_source
from scllm.engine.gene_init import gene_vectors
from scllm.models import CellModel
from scllm.tl._model import gene_match

KEY = "cell_type"


def main(run_dir: str, epochs: int) -> None:
    adata = sorted_cells()
    model = scllm.tl.pretrain(
        adata, size="small", left_out=0.25, mask_ratio=0.5, lr=5e-4, dropout=0.1, epochs=epochs, run_dir=run_dir,
        config=scllm.tl.TrainConfig(max_len=301, save_every=50, relational=False),
    )  # fmt: skip
    validation = model.history.query("split == 'validation'")
    print(validation[["epoch", "mse", "mse_share", "mse_cell"]].to_string(index=False))
    names = []
    for name, values in embeddings(adata, model).items():
        adata.obsm[name] = values
        names.append(name)
    table = scllm.tl.benchmark(adata, use_rep=names, key=KEY)
    print(table.round(3).to_string())


def sorted_cells() -> AnnData:
    """Read cells sorted into ten types before sequencing, with all genes that have at least three counts."""
    shared = Path(os.environ.get("SCLLM_SHARED", Path(__file__).parents[2] / "shared"))
    adata = ad.read_h5ad(shared / "data" / "pbmc_zheng2017_facs.h5ad")
    sc.pp.filter_genes(adata, min_counts=3)
    return adata


def embeddings(adata: AnnData, model: CellModel) -> dict[str, np.ndarray]:
    """Compute embeddings by name: an SVD of the same genes, the mean gene vector, and every layer of the model."""
    logged = adata.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    found = {"SVD, 50 components": TruncatedSVD(50, random_state=0).fit_transform(logged.X)}
    source = open_source(adata)
    match = gene_match(adata, source, model)
    table = gene_vectors(source, match, np.arange(adata.n_obs), model.config.d_model, len(model.vocab))
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)
    expressed = (adata.X > 0).astype(np.float32)
    found["mean gene vector"] = expressed @ table[match.token_ids] / np.asarray(expressed.sum(1))
    found["<cls>"] = embedded(adata, model)
    for layer in range(-model.config.n_layers - 1, 0):
        for pooling in ("mean", "ranked"):
            found[f"{pooling}, hidden_layer={layer}"] = embedded(adata, model, pooling=pooling, hidden_layer=layer)
    return found


def embedded(adata: AnnData, model: CellModel, **options) -> np.ndarray:
    """Return a copy of what :func:`scllm.tl.embed` writes."""
    scllm.tl.embed(adata, model, **options)
    return adata.obsm["X_scllm"].copy()


if __name__ == "__main__":
    pd.set_option("display.width", 200)
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4)
