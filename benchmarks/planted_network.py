"""Infer networks of simulated cells whose edges are known, with models that were trained in different ways.

Usage: python -m benchmarks.planted_network OUT.csv. In 600 cells of three types, each of 6 regulators drives 6 of 100
genes, up or down.
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

import scllm

N_CELLS, N_GENES, N_REGULATORS, N_TARGETS, EFFECT = 600, 100, 6, 6, 0.8
PLAIN = {"lr": 3e-3, "batch_size": 32}
SCHEDULE = {"schedule": "cosine", "relational": False}
# name -> arguments of tl.pretrain
TRAININGS = {
    "plain, 400 steps": {**PLAIN, "config": scllm.tl.TrainConfig(steps=400, warmup=20, **SCHEDULE)},
    "plain, 2,000 steps": {**PLAIN, "config": scllm.tl.TrainConfig(steps=2000, warmup=100, **SCHEDULE)},
    "default": {},
}


def main(out: str, n_seeds: int = 3) -> None:
    torch.set_num_threads(1)
    scllm.settings.run_dir = tempfile.mkdtemp()
    scllm.settings.verbosity = 0
    tables = []
    for seed in range(n_seeds):
        adata, edges = cells(seed)
        for name, options in TRAININGS.items():
            began = time.monotonic()
            model = scllm.tl.pretrain(adata, "scgpt", size="tiny", device="cpu", random_state=seed, **options)
            tables.append(networks(adata, model, edges).assign(training=name, seed=seed))
            pd.concat(tables).to_csv(out, index=False)
            print(f"seed {seed}, {name}: {time.monotonic() - began:.0f} s", flush=True)
    found = pd.concat(tables).drop(columns="group").groupby(["training", "method"], sort=False).mean(numeric_only=True)
    print(found.drop(columns="seed").round(3).to_string())


def cells(seed: int) -> tuple[AnnData, pd.DataFrame]:
    """Simulate counts, and return them with the edges from regulators to targets and their signs."""
    rng = np.random.default_rng(seed)
    log_rate = (
        np.log(rng.gamma(1.0, 4.0, N_GENES) + 0.5) + 0.3 * rng.normal(size=(3, N_GENES))[rng.integers(3, size=N_CELLS)]
    )
    activity = EFFECT * rng.normal(size=(N_CELLS, N_REGULATORS))
    genes = rng.permutation(N_GENES)
    sources = np.repeat(genes[:N_REGULATORS], N_TARGETS)
    targets = genes[N_REGULATORS : N_REGULATORS + len(sources)]
    sign = rng.choice([1, -1], len(targets), p=[0.7, 0.3])
    log_rate[:, genes[:N_REGULATORS]] += activity
    log_rate[:, targets] += sign * np.repeat(activity, N_TARGETS, axis=1)
    depth = rng.lognormal(0, 0.3, (N_CELLS, 1))
    names = np.array([f"gene_{i}" for i in range(N_GENES)])
    counts = sparse.csr_matrix(rng.poisson(np.exp(log_rate) * depth).astype(np.float32))
    adata = AnnData(counts, pd.DataFrame(index=[f"cell_{i}" for i in range(N_CELLS)]), pd.DataFrame(index=names))
    return adata, pd.DataFrame({"source": names[sources], "target": names[targets], "sign": sign})


def networks(adata: AnnData, model: scllm.models.CellModel, edges: pd.DataFrame) -> pd.DataFrame:
    """Score networks of 100 cells against the planted edges, and count the significant edges of deletions."""
    scores = []
    for method in ("attention", "similarity", "perturb"):
        scllm.tl.infer_grn(adata, model, method=method, reference=edges, max_cells=100, n_edges=N_GENES, device="cpu")
        scores.append(adata.uns["scllm"]["grn"]["scores"])
    return (
        pd.concat(scores)
        .drop_duplicates("method")
        .merge(significant(adata.uns["scllm"]["grn"]["table"], edges), how="left")
    )


def significant(found: pd.DataFrame, edges: pd.DataFrame) -> pd.DataFrame:
    """Count the significant edges, those between genes of one regulator, planted and reversed ones, and right signs."""
    module = {**dict(zip(edges["target"], edges["source"], strict=True)), **{name: name for name in edges["source"]}}
    sign = edges.set_index(["source", "target"])["sign"]
    pairs = list(zip(found["source"], found["target"], strict=True))
    is_planted = np.array([pair in sign.index for pair in pairs], bool)
    is_reversed = np.array([pair[::-1] in sign.index for pair in pairs], bool)
    is_related = [a in module and module[a] == module.get(b) for a, b in pairs]
    right = [sign[pair] == of for pair, of in zip(pairs, found["sign"], strict=True) if pair in sign.index]
    return pd.DataFrame(
        [{
            "method": "perturb", "n_significant": len(found), "n_related": sum(is_related),
            "n_planted": is_planted.sum(), "n_reversed": is_reversed.sum(), "right_sign": np.mean(right or [np.nan]),
        }]
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
