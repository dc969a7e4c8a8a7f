"""What pretraining adds on 3,874 sorted blood cells: ``python -m benchmarks.study_blood [EPOCHS]``, minutes an epoch.

Reads ``pbmc_zheng2017_facs.h5ad`` below ``SCLLM_SHARED``, pretrains ``size="small"`` on all genes, and probes
embeddings of every depth beside an SVD of the same genes: 5-fold logistic regression and nearest neighbours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
from sklearn.decomposition import TruncatedSVD

import scllm
from scllm import metrics


def main(epochs: int) -> None:
    shared = Path(os.environ.get("SCLLM_SHARED", Path(__file__).parents[2] / "shared"))
    adata = ad.read_h5ad(shared / "data" / "pbmc_zheng2017_facs.h5ad")
    sc.pp.filter_genes(adata, min_counts=3)
    truth = adata.obs["cell_type"].to_numpy()
    model = scllm.tl.pretrain(
        adata, size="small", left_out=0.25, mask_ratio=0.5, lr=5e-4, dropout=0.1, epochs=epochs, run_dir="study_blood",
        config=scllm.tl.TrainConfig(max_len=301, save_every=50),
    )  # fmt: skip
    validation = model.history.query("split == 'validation'")
    print(validation[["epoch", "mse", "mse_share", "mse_cell"]].to_string(index=False))
    logged = adata.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    probe("SVD, 50 components", TruncatedSVD(50, random_state=0).fit_transform(logged.X), truth)
    scllm.tl.embed(adata, model)
    probe("<cls>", adata.obsm["X_scllm"], truth)
    for layer in range(-model.config.n_layers - 1, 0):
        scllm.tl.embed(adata, model, pooling="mean", hidden_layer=layer)
        probe(f"mean, hidden_layer={layer}", adata.obsm["X_scllm"], truth)


def probe(name: str, embedding: np.ndarray, truth: np.ndarray) -> None:
    scores = metrics.logistic_regression_scores(embedding, truth)
    nearest = metrics.knn_accuracy(embedding, truth)
    print(f"{name:24} {scores['accuracy']:.3f} / {scores['macro_f1']:.3f}   neighbours {nearest:.3f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
