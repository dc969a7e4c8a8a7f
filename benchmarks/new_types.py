"""Find cells of a type that was left out of training: ``python -m benchmarks.new_types FOLDER [SET ...]``.

Each type of a set is left out in turn. The other cells are divided into training, validation and test cells. A tiny
model is pretrained on the training cells and fine-tuned on their labels; a logistic regression on log-normalised
expression is fitted to the same cells. Scores are the area under the ROC curve (AUROC) with which a score tells cells
of the left-out type from test cells, and the share of both that is called unknown at ``fpr=0.05``. Thresholds are
chosen on the validation cells. Test cells and cells of the left-out type are not used before the end. Finished types in
``FOLDER`` are not run again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
import torch
from anndata import AnnData, read_h5ad
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import scllm
from benchmarks._cells import SHARED
from scllm.data.source import open_source
from scllm.engine.head_start import whitening
from scllm.engine.predict import predict
from scllm.models import CellModel
from scllm.tl._model import gene_match
from scllm.tl._unknown import FPR, cutoff_at

KEY = "cell_type"
# file, and number of its cells that are used, because each type takes a training
SETS = {"pancreas": ("pancreas_2studies", 2_000), "sorted": ("pbmc_zheng2017_facs", 800)}
PRETRAINING = {
    "size": "tiny",
    "batch_size": 64,
    "lr": 1e-3,
    "config": scllm.tl.TrainConfig(steps=40, max_len=129, relational=False),
}
FINE_TUNING = {"epochs": 2, "batch_size": 64, "config": scllm.tl.TrainConfig(max_len=129)}
# both on whitened states, with the ridge of engine/calibrate.py
RIDGE, N_NEIGHBORS = 0.03, 10


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        adata = read(*SETS[name])
        rows = {}
        for left_out in adata.obs[KEY].cat.categories:
            file = folder / f"{name}-{left_out}.json".replace("/", "_")
            if not file.exists():
                began = time.process_time()
                found = scores(adata, left_out, file.with_suffix(""))
                file.write_text(json.dumps({**found, "seconds": time.process_time() - began}))
            rows[left_out] = json.loads(file.read_text())
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.loc["mean"] = table.mean()
        print(f"{name}\n{table.round(3).to_markdown()}\n", flush=True)


def read(file: str, n_cells: int) -> AnnData:
    """Read some cells of a set without genes that have fewer than three counts."""
    adata = read_h5ad(SHARED / f"{file}.h5ad")
    adata = adata[np.sort(np.random.default_rng(0).choice(adata.n_obs, n_cells, replace=False))].copy()
    sc.pp.filter_genes(adata, min_counts=3)
    return adata


def scores(adata: AnnData, left_out: str, folder: Path) -> dict[str, float]:
    """Train without a type; return the AUROC of each score, and shares of cells that are called unknown."""
    is_new = (adata.obs[KEY] == left_out).to_numpy()
    known, new = adata[~is_new].copy(), adata[is_new].copy()
    known.obs[KEY] = known.obs[KEY].cat.remove_unused_categories()
    scllm.pp.split(known, fractions=(0.72, 0.08, 0.2), stratify=KEY)
    options = {"validation": "split", "device": "cpu"}
    model = scllm.tl.pretrain(known, "scgpt", run_dir=folder / "pretrained", **PRETRAINING, **options)
    tuned = scllm.tl.finetune(known, model, key=KEY, run_dir=folder / "tuned", **FINE_TUNING, **options)
    parts = {name: known[(known.obs["split"] == name).to_numpy()].copy() for name in ("train", "validation", "test")}
    parts["new"] = new
    in_space, by_regression = in_whole_space(tuned, parts), logistic_regression(parts)
    found = {}
    for name in ("validation", "test", "new"):
        obs = scllm.tl.classify(parts[name], tuned, unknown="distance", device="cpu", copy=True).obs
        found[name] = {
            "probability": -obs["scllm_label_prob"].to_numpy(),
            "distance": obs["scllm_label_distance"].to_numpy(),
            **in_space[name],
            "logistic regression": -by_regression[name],
        }
    row = {score: auroc(found["test"][score], found["new"][score]) for score in found["new"]}
    for score in ("probability", "distance", "logistic regression"):
        limit = cutoff_at(found["validation"][score], FPR)
        row |= {f"{part}, {score}": float((found[part][score] > limit).mean()) for part in ("new", "test")}
    return row


def in_whole_space(tuned: CellModel, parts: dict[str, AnnData]) -> dict[str, dict[str, np.ndarray]]:
    """Compute both distances in all directions of what the head reads: to class means, and to the tenth neighbour."""
    states = {name: inputs_of_head(tuned, cells) for name, cells in parts.items()}
    codes = torch.from_numpy(parts["train"].obs[KEY].cat.codes.to_numpy().astype(np.int64))
    center, whiten = whitening(states["train"], RIDGE, codes)
    white = {name: (values - center) @ whiten for name, values in states.items()}
    means = torch.stack([white["train"][codes == code].mean(0) for code in codes.unique()])
    search = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(white["train"])
    return {
        name: {
            "Mahalanobis": torch.cdist(values, means).amin(1).numpy(),
            "neighbours": search.kneighbors(values)[0][:, -1],
        }
        for name, values in white.items()
    }


def inputs_of_head(tuned: CellModel, cells: AnnData) -> torch.Tensor:
    source = open_source(cells)
    forward = lambda replica, batch: replica.head_inputs(batch)  # noqa: E731
    found = predict(tuned, source, gene_match(cells, source, tuned), forward, device="cpu")
    return torch.cat([values for _, values in found])


def logistic_regression(parts: dict[str, AnnData]) -> dict[str, np.ndarray]:
    """Fit log-normalised expression of the training cells; return the probability of the best label."""
    logged = {
        name: sc.pp.log1p(sc.pp.normalize_total(cells, target_sum=1e4, inplace=False)["X"])
        for name, cells in parts.items()
    }
    linear = LogisticRegression(max_iter=300).fit(logged["train"], parts["train"].obs[KEY])
    return {name: linear.predict_proba(values).max(axis=1) for name, values in logged.items()}


def auroc(known: np.ndarray, new: np.ndarray) -> float:
    return float(roc_auc_score(np.repeat([0, 1], [len(known), len(new)]), np.concatenate([known, new])))


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), sys.argv[2:] or list(SETS))
