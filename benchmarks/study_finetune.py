"""Fine-tuned labels beside logistic regression: ``python -m benchmarks.study_finetune MODEL [FOLDS]``.

Five stratified folds of the sorted blood cells; the model of ``study_blood`` is fine-tuned on four of them, the
baseline is a logistic regression on 50 components of an SVD of log-normalised counts. ``FOLDS`` runs only the
first so many.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import scanpy as sc
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scllm
from benchmarks.study_blood import KEY, sorted_cells

EPOCHS = 4


def main(model: str, n_folds: int) -> None:
    adata = sorted_cells()
    truth = adata.obs[KEY].to_numpy(dtype=object)
    logged = sc.pp.log1p(sc.pp.normalize_total(adata, target_sum=1e4, inplace=False)["X"])
    scores = []
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(truth, truth)
    for _, (training, test) in zip(range(n_folds), folds, strict=False):
        baseline = make_pipeline(
            TruncatedSVD(50, random_state=0), StandardScaler(), LogisticRegression(max_iter=2000)
        ).fit(logged[training], truth[training])
        by_model = labelled(model, adata[training].copy(), adata[test].copy())
        for predicted in (baseline.predict(logged[test]), by_model):
            found = scllm.metrics.classification_scores(truth[test], predicted)
            scores.append((found["accuracy"], found["macro_f1"]))
        both = np.array(scores).reshape(-1, 2, 2).mean(0)
        print(f"{len(scores) // 2} folds: baseline {both[0].round(3)}, fine-tuned {both[1].round(3)}", flush=True)


def labelled(model: str, training: sc.AnnData, test: sc.AnnData) -> np.ndarray:
    """Labels of cells that the fine-tuned model has not seen."""
    with tempfile.TemporaryDirectory() as folder:
        tuned = scllm.tl.finetune(
            training, model, key=KEY, epochs=EPOCHS, run_dir=Path(folder) / "run",
            config=scllm.tl.TrainConfig(max_len=301),
        )  # fmt: skip
        scllm.tl.classify(test, tuned)
    return test.obs["scllm_label"].to_numpy(dtype=object)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
