"""Cross-validate labels on five data sets: ``python -m benchmarks.study_labels FOLDER FAMILY SIZE [SET ...]``.

The model is pretrained on all cells of a set, without labels, and fine-tuned in each fold with the default settings.
Where whole groups are held out, it is also fine-tuned with heads that read only the input embeddings. Logistic
regressions use the same folds: one on all genes (the baseline of ``tl.cross_validate``) and one on 50 components of an
SVD. Finished parts in ``FOLDER`` are not run again.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import pandas as pd
import scanpy as sc
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scllm

KEY = "cell_type"
PRETRAINING = {
    "scgpt": {"left_out": 0.25, "mask_ratio": 0.5, "dropout": 0.1, "lr": 5e-4},
    "geneformer": {"dropout": 0.1, "lr": 5e-4},
}
SCORES = ["accuracy", "macro_f1"]
METHODS: dict[str, dict] = {
    "fine-tuned": {"config": scllm.tl.TrainConfig(head_reads="both")},  # the default
    "fine-tuned, heads on the inputs": {"config": scllm.tl.TrainConfig(head_reads="inputs")},
}


@dataclass(frozen=True)
class LabelledSet:
    """Name of a file in ``data/``, epochs of pretraining, and how folds are split: by cell (``None``) or by group."""

    file: str
    epochs: int
    group_keys: tuple[str | None, ...] = (None,)


SETS = {
    "pbmc68k": LabelledSet("pbmc68k_reduced_counts", epochs=10),
    "kang": LabelledSet("pbmc_kang2018_ifnb_labelled", epochs=8),
    "celllines": LabelledSet("celllines_scmixology_celseq2_5lines", epochs=8),
    "pancreas": LabelledSet("pancreas_2studies", epochs=6, group_keys=(None, "donor", "study")),
    "zheng": LabelledSet("pbmc_zheng2017_facs", epochs=4),
}


def main(folder: Path, family: str, size: str, names: list[str]) -> None:
    rows = {}
    for name in names:
        chosen = SETS[name]
        adata = read(chosen)
        model = pretrained(folder, name, family, size, adata)
        for group_key in chosen.group_keys:
            n_folds = 5 if group_key is None else min(5, adata.obs[group_key].nunique())
            tested = group_key or "cells"
            for method, options in METHODS.items():
                on_inputs = method != "fine-tuned"
                if on_inputs and group_key is None:
                    continue  # tried for new groups only
                found = scllm.tl.cross_validate(
                    adata, model, key=KEY, n_folds=n_folds, group_key=group_key, baseline=not on_inputs,
                    run_dir=folder / f"{name}-{family}-{size}-{tested}{'-inputs' if on_inputs else ''}", **options,
                )  # fmt: skip
                means = found.groupby("method")[SCORES].mean()
                rows[name, tested, method] = means.loc["model"]
                if not on_inputs:
                    rows[name, tested, "logistic regression"] = means.loc["baseline"]
                    rows[name, tested, "logistic regression, SVD-50"] = svd_scores(adata, n_folds)
            print(pd.DataFrame.from_dict(rows, orient="index").round(3).to_string(), flush=True)


def pretrained(folder: Path, name: str, family: str, size: str, adata: ad.AnnData) -> scllm.models.CellModel:
    """Pretrain on all cells of a set without labels, on a random subset of at most 300 genes of a cell."""
    return scllm.tl.pretrain(
        adata, family, size=size, epochs=SETS[name].epochs, config=scllm.tl.TrainConfig(max_len=301, relational=False),
        run_dir=folder / f"{name}-{family}-{size}", **PRETRAINING[family],
    )  # fmt: skip


def read(chosen: LabelledSet) -> ad.AnnData:
    """Read a set without its doublets and without genes that have fewer than three counts."""
    shared = Path(os.environ.get("SCLLM_SHARED", Path(__file__).parents[2] / "shared"))
    adata = ad.read_h5ad(shared / "data" / f"{chosen.file}.h5ad")
    if "demuxlet_class" in adata.obs:
        adata = adata[adata.obs["demuxlet_class"] == "SNG"].copy()
    sc.pp.filter_genes(adata, min_counts=3)
    return adata


def svd_scores(adata: ad.AnnData, n_folds: int) -> pd.Series:
    """Score a logistic regression on 50 SVD components, on the folds that ``cross_validate`` wrote to ``obs``."""
    logged = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, inplace=False)["X"])
    truth, fold = adata.obs[KEY].to_numpy(dtype=object), adata.obs[f"{KEY}_cv_fold"].astype(int).to_numpy()
    found = []
    for number in range(n_folds):
        training, test = fold != number, fold == number
        linear = make_pipeline(TruncatedSVD(50, random_state=0), StandardScaler(), LogisticRegression(max_iter=2000))
        predicted = linear.fit(logged[training], truth[training]).predict(logged[test])
        found.append(scllm.metrics.classification_scores(truth[test], predicted))
    return pd.DataFrame(found)[SCORES].mean()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:] or list(SETS))
