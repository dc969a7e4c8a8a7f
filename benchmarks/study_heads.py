"""How freely fresh heads should learn: ``python -m benchmarks.study_heads FOLDER FAMILY SIZE [SET ...]``.

Heads alone, as logistic regressions on whitened states of the pretrained models of ``study_labels`` (taken from
``FOLDER``, or made there): what is whitened, all variance or that within labels, with more or less of a ridge and of a
penalty; out of five folds, and from one study of the pancreas to the other. Losses are mean negative log-likelihoods
of the cells tested.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

import scllm
from benchmarks.study_labels import KEY, SETS, pretrained, read
from scllm.data.source import open_source
from scllm.engine.head_start import whitening
from scllm.engine.predict import predict
from scllm.models.heads import HeadSpec
from scllm.tl._model import gene_match

# ridge and penalty
SETTINGS = {"all": ((0.1, 10.0), (1.0, 1.0)), "within labels": ((0.3, 10.0), (1.0, 10.0))}


def main(folder: Path, family: str, size: str, names: list[str]) -> None:
    rows = {}
    for name in names:
        adata = read(SETS[name])
        model = pretrained(folder, name, family, size, adata)
        truth = adata.obs[KEY].to_numpy(dtype=object)
        # inputs alone are for new groups
        for reads in ("both", "inputs") if name == "pancreas" else ("both",):
            states = head_inputs(model, adata, reads)
            for tested, divided in divisions(name, adata):
                for variance, pairs in SETTINGS.items():
                    for ridge, penalty in pairs:
                        found = [scores(states, truth, *cells, variance, ridge, penalty) for cells in divided]
                        rows[name, tested, reads, variance, ridge, penalty] = pd.DataFrame(found).mean()
        print(pd.DataFrame.from_dict(rows, orient="index").round(4).to_string(), flush=True)


def head_inputs(model: scllm.models.CellModel, adata: ad.AnnData, reads: str) -> torch.Tensor:
    """What a head of ``finetune`` reads of each cell."""
    pooling = "ranked" if reads == "inputs" else model.head_pooling
    model.set_heads([HeadSpec(KEY, tuple(np.unique(adata.obs[KEY])), pooling=pooling, reads=reads)])
    source = open_source(adata)
    parts = predict(model, source, gene_match(adata, source, model), lambda one, batch: one.head_inputs(batch))
    return torch.cat([values for _, values in parts])


def divisions(name: str, adata: ad.AnnData):
    """What is tested, and the training and test cells of each part of it."""
    truth = adata.obs[KEY].to_numpy(dtype=object)
    yield "cells", list(StratifiedKFold(5, shuffle=True, random_state=0).split(truth, truth))
    if name == "pancreas":
        studies = adata.obs["study"].to_numpy(dtype=object)
        for study in np.unique(studies):
            yield study, [(np.flatnonzero(studies != study), np.flatnonzero(studies == study))]


def scores(states, truth, training, test, variance: str, ridge: float, penalty: float) -> dict[str, float]:
    labels = torch.from_numpy(np.unique(truth[training], return_inverse=True)[1])
    mean, whiten = whitening(states[training], ridge, labels if variance == "within labels" else None)
    white = ((states - mean) @ whiten).numpy()
    probe = LogisticRegression(C=1 / penalty, max_iter=3000).fit(white[training], truth[training])
    found = scllm.metrics.classification_scores(truth[test], probe.predict(white[test]))
    loss = log_loss(truth[test], probe.predict_proba(white[test]), labels=probe.classes_)
    return {"accuracy": found["accuracy"], "macro_f1": found["macro_f1"], "loss": loss}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:] or list(SETS))
