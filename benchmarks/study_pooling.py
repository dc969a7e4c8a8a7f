"""What heads should read: ``python -m benchmarks.study_pooling [FAMILY ...]``.

A linear probe on states of an untrained model (``size="tiny"``, gene table from the training cells' singular vectors),
pooled over genes in each way, on the sets of ``study_labels``: from one pancreas study to the other, and out of folds.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

import scllm
from benchmarks.study_compression import started
from benchmarks.study_labels import KEY, SETS, read
from scllm.engine.head_start import whitening

N_FOLDS = {"pbmc68k": 5, "kang": 5, "zheng": 2}
STRENGTHS = (0.01, 0.1, 1.0)


def main(families: list[str]) -> None:
    rows = {}
    for family in families:
        for name, training, test in divisions():
            adata = read(SETS["pancreas" if name.startswith("pancreas") else name])
            model = started(family, adata.n_vars, "tiny")(adata[training].copy())
            if family == "geneformer":
                model = with_medians(model, adata[training].copy())
            for pooling in ("mean", "ranked", "linear", "max"):
                states = scllm.tl.embed(adata, model, pooling=pooling, copy=True).obsm["X_scllm"]
                found = scores(states, adata.obs[KEY].to_numpy(dtype=object), training, test)
                rows.setdefault((name, family, pooling), []).append(found)
    means = {key: np.mean(found, axis=0) for key, found in rows.items()}
    columns = pd.MultiIndex.from_product([[f"C={c:g}" for c in STRENGTHS], ["accuracy", "macro F1"]])
    print(pd.DataFrame.from_dict(means, orient="index", columns=columns).round(3).to_string())


def divisions():
    """Name, training and test cells of each question."""
    studies = read(SETS["pancreas"]).obs["study"].to_numpy(dtype=object)
    for study in np.unique(studies):
        yield f"pancreas, {study}", np.flatnonzero(studies != study), np.flatnonzero(studies == study)
    for name, n_folds in N_FOLDS.items():
        labels = read(SETS[name]).obs[KEY].to_numpy(dtype=object)
        folds = StratifiedKFold(5, shuffle=True, random_state=0).split(labels, labels)
        for (training, test), _ in zip(folds, range(n_folds), strict=False):
            yield name, training, test


def with_medians(model: scllm.models.CellModel, adata: ad.AnnData) -> scllm.models.CellModel:
    """The model, ranking genes by the medians of these cells."""
    medians = scllm.pp.gene_medians(adata, copy=True).var["median_expression"].reindex(model.vocab.tokens)
    model.encoder = replace(model.encoder, medians=medians.to_numpy(np.float64))
    return model


def scores(states, truth, training, test) -> list[float]:
    """Accuracy and macro F1 of a logistic regression on whitened states, of each strength."""
    mean, whiten = whitening(torch.from_numpy(states[training]), ridge=0.1)
    white = (torch.from_numpy(states) - mean) @ whiten
    found = []
    for strength in STRENGTHS:
        probe = LogisticRegression(C=strength, max_iter=3000).fit(white[training].numpy(), truth[training])
        result = scllm.metrics.classification_scores(truth[test], probe.predict(white[test].numpy()))
        found += [result["accuracy"], result["macro_f1"]]
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(sys.argv[1:] or ["scgpt", "geneformer"])
