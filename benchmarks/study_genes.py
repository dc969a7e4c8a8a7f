"""Classify dosage-sensitive transcription factors: ``python -m benchmarks.study_genes FOLDER [FAMILY ...]``.

The data are sorted blood cells with the 490 labelled factors and the 1,000 most variable genes. ``size="tiny"`` is
pretrained on 1,000 of the cells in ``FOLDER``; a finished run there is reused. Five-fold scores of
``tl.classify_genes`` on all cells and of its baseline are printed for several settings.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd
import scanpy as sc
from anndata import AnnData

import scllm
from benchmarks._cells import SHARED
from benchmarks.study_blood import sorted_cells

PRETRAIN: dict[str, dict] = {
    "scgpt": {"lr": 1e-3, "mask_ratio": 0.5, "left_out": 0.25, "dropout": 0.1, "epochs": 2},
    "geneformer": {"lr": 5e-4, "epochs": 2},
}
SETTINGS: dict[str, dict] = {
    "frozen": {"freeze": "encoder"},
    "frozen, no class weights": {"freeze": "encoder", "class_weight": None},
    "frozen, cross-entropy": {"freeze": "encoder", "loss": "ce"},
    "frozen, focal": {"freeze": "encoder", "loss": "focal"},
    "1 epoch": {"epochs": 1},
    "3 epochs": {"epochs": 3},
    "3 epochs, first block frozen": {"epochs": 3, "freeze": 1},
}
METRICS = ["auroc", "auprc", "accuracy", "balanced_accuracy"]


def main(folder: Path, families: list[str]) -> None:
    adata, labels = cells_and_labels()
    print(adata.shape, flush=True)
    for family in families:
        began = time.process_time()
        model = scllm.tl.pretrain(
            sc.pp.sample(adata, n=1000, rng=0, copy=True), family, size="tiny", batch_size=32, run_dir=folder / family,
            config=scllm.tl.TrainConfig(schedule="cosine", warmup=20, relational=False), **PRETRAIN[family],
        )  # fmt: skip
        losses = model.history.query("split == 'validation'")["loss"].round(3).tolist()
        print(family, losses, f"{time.process_time() - began:.0f} s", flush=True)
        for name, options in SETTINGS.items():
            began = time.process_time()
            scllm.settings.run_dir = folder / "folds"
            table = scllm.tl.classify_genes(adata, model, labels=labels, **options)
            means = table.groupby("method", sort=False)[METRICS].agg(["mean", "std"]).round(3)
            print(f"\n{family}, {name} ({time.process_time() - began:.0f} s)\n{means.to_string()}", flush=True)


def cells_and_labels() -> tuple[AnnData, pd.DataFrame]:
    """Read sorted blood cells with labelled and variable genes, and the labels."""
    labels = scllm.datasets.gene_set(path=SHARED / "gene_sets" / "dosage_sensitivity_tfs.csv")
    adata = sorted_cells()
    variable = sc.pp.highly_variable_genes(adata, n_top_genes=1000, flavor="seurat_v3", inplace=False)
    kept = variable["highly_variable"].to_numpy() | adata.var["ensembl_id"].isin(labels.index).to_numpy()
    return adata[:, kept].copy(), labels


if __name__ == "__main__":
    pd.set_option("display.width", 200)
    main(Path(sys.argv[1]), sys.argv[2:] or list(PRETRAIN))
