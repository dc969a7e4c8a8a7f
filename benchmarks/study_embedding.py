"""Compare embeddings of models pretrained in three ways: ``python -m benchmarks.study_embedding SETS [SEEDS]``.

``SETS`` is ``selection`` (on which defaults are chosen) or ``report`` (looked at once, with the chosen way only).
Prints the mean of the six scores of ``tl.benchmark``, nearest-neighbour accuracy and label transfer between batches,
beside PCA. ``cost`` instead prints how long a step of each way takes, in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
import pandas as pd
import torch
from anndata import AnnData, read_h5ad
from sklearn.preprocessing import normalize

from benchmarks._cells import SHARED
from scllm import models, tl

# data set, and the column of groups between which labels are transferred
SETS = {
    "selection": {"pancreas_2studies": "study", "pbmc_kang2018_ifnb_labelled": "condition"},
    "report": {
        "pbmc_zheng2017_facs": None,
        "pbmc_10x_3batches": "batch",
        "celllines_scmixology_celseq2_5lines": "batch",
        "pbmc68k_reduced_counts": None,
    },
}
WAYS = {
    "plain": {"relational": False, "skip": False},
    "relational": {"relational": True, "skip": False},
    "relational, skip": {"relational": True, "skip": True},
}
# the way of the report sets, chosen on the selection sets
CHOSEN = ("relational, skip",)
STEPS = {"steps": 500, "batch_size": 64, "lr": 3e-3, "warmup": 20, "schedule": "cosine", "max_len": 256}
COLUMNS = ("bio", "knn_accuracy", "transfer_from_reference", "transfer_to_reference")


def main() -> None:
    if sys.argv[1] == "cost":
        print(_costs().round(3).to_string())
        return
    sets, seeds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1
    ways = list(WAYS) if sets == "selection" else list(CHOSEN)
    header = ("data", "embedding", "CPU-seconds", "mean of six", "kNN accuracy", "transfer there, back")
    print(_line(header), _line(["---"] * len(header)), sep="\n", flush=True)
    for data, group in SETS[sets].items():
        adata = read_h5ad(SHARED / f"{data}.h5ad")
        if "demuxlet_class" in adata.obs:
            adata = adata[adata.obs["demuxlet_class"] == "SNG"].copy()  # doublets have no type
        pca = _scores(adata, group, "X_pca")
        print(_line([data, "PCA", "", *_words([pca])]), flush=True)
        adata.obsm["X_unit"] = normalize(adata.obsm["X_pca"])
        print(_line([data, "PCA, unit length", "", *_words([_scores(adata, group, "X_unit")])]), flush=True)
        for way in ways:
            found = [_embedded(adata, seed, **WAYS[way]) for seed in range(seeds)]
            scores = [_scores(adata, group, key) for key, _ in found]
            print(_line([data, way, f"{np.mean([s for _, s in found]):.0f}", *_words(scores)]), flush=True)


def _costs() -> pd.DataFrame:
    """Measure seconds of the median step of 20 in each way, in five rounds, and their ratios to the plain way."""
    adata = read_h5ad(SHARED / "pancreas_2studies.h5ad")
    seconds = []
    for _ in range(5):
        for way, settings in WAYS.items():
            history = _trained(adata, 0, **settings, steps=20).history.query("split == 'train'")
            seconds.append((way, (STEPS["batch_size"] / history["cells_per_s"].iloc[5:]).median()))
    rounds = pd.DataFrame(seconds, columns=["way", "seconds"])
    ratio = rounds["seconds"] / rounds["seconds"].where(rounds["way"] == "plain").ffill()
    return rounds.assign(ratio=ratio).groupby("way", sort=False).agg(["median", "min", "max"])


def _trained(adata: AnnData, seed: int, *, relational: bool, skip: bool, **options: int) -> models.CellModel:
    torch.manual_seed(seed)
    model = models.build("scgpt", vocab=adata.var_names, size="tiny", pooled_skip=skip, dropout=0.0)
    config = tl.TrainConfig(relational=relational, gene_init="svd", save_every=None, **STEPS | options)
    with tempfile.TemporaryDirectory() as folder:
        return tl.pretrain(adata, model, device="cpu", run_dir=f"{folder}/run", config=config, random_state=seed)


def _embedded(adata: AnnData, seed: int, *, relational: bool, skip: bool) -> tuple[str, float]:
    """Pretrain a tiny scgpt and embed the cells; return the key and the CPU-seconds of training."""
    key, began = f"X_{relational}_{skip}_{seed}", time.process_time()
    trained = _trained(adata, seed, relational=relational, skip=skip)
    seconds = time.process_time() - began
    tl.embed(adata, trained, device="cpu", key_added=key)
    return key, seconds


def _scores(adata: AnnData, group: str | None, key: str) -> pd.Series:
    if key == "X_pca" and key not in adata.obsm:
        from scllm.tl._benchmark import _pca

        adata.obsm[key] = _pca(adata)
    table = tl.benchmark(adata, use_rep=key, key="cell_type", batch_key=group, reference=group and "each")
    return table.loc[key].reindex(COLUMNS)


def _words(scores: list[pd.Series]) -> list[str]:
    """Describe means over seeds, with the range if there are several."""
    table = pd.DataFrame(scores)
    words = [
        f"{column.mean():.3f}" + (f" [{column.min():.3f}, {column.max():.3f}]" if len(scores) > 1 else "")
        for _, column in table.items()
    ]
    return [*words[:2], "" if table.iloc[:, 2].isna().any() else ", ".join(words[2:])]


def _line(cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
