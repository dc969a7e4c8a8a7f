"""Score the perturbation model on a CRISPR screen (Papalexi et al. 2021), beside baselines and the replicate ceiling.

Usage: python -m benchmarks.perturbation SCREEN.h5ad OUT. All cells with clean guides (dominant_guide_fraction > 0.8)
are used, and 3 random thirds of the targets are held out in turn. Writes OUT_table.csv, OUT_abstention.csv and
OUT_summary.csv, in which scores are averaged over all targets, and over those that are among the measured genes.
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
import pandas as pd
import torch

import scllm
from benchmarks._cells import CONTROL, screen
from scllm.tl._perturbation_scores import _summary

# the defaults, 15 epochs of 64 cells a step, take too long for a benchmark
SETTINGS = {"epochs": 4, "batch_size": 32, "lr": 1e-3}


def main(path: str, out: str) -> None:
    torch.set_num_threads(1)
    scllm.settings.run_dir = tempfile.mkdtemp()
    adata, controls = screen(path)
    began = time.time()
    plain = scllm.tl.TrainConfig(relational=False)
    start = scllm.tl.pretrain(controls, "scgpt", size="tiny", epochs=3, lr=1e-3, device="cpu", config=plain)
    names = np.random.default_rng(0).permutation(sorted(set(adata.obs["perturbation"].astype(str)) - {CONTROL}))
    tables, abstention = [], []
    for split, held_out in enumerate(np.array_split(names, 3)):
        scllm.tl.fit_perturbation(
            adata, start, key="perturbation", control=CONTROL, batch_key="bio_rep", held_out=held_out.tolist(),
            device="cpu", **SETTINGS,
        )  # fmt: skip
        entry = adata.uns["scllm"]["perturbation"]
        tables.append(entry["table"].assign(split=split))
        abstention.append(entry["abstention"].assign(split=split))
        print(f"split {split}: {time.time() - began:.0f} s in all", flush=True)
        pd.concat(tables).to_csv(f"{out}_table.csv", index=False)
        pd.concat(abstention).to_csv(f"{out}_abstention.csv", index=False)
    summarise(pd.concat(tables, ignore_index=True)).to_csv(f"{out}_summary.csv", index=False)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Average over the targets of all splits as :func:`scllm.tl.fit_perturbation` does over those of one."""
    return _summary(table, seed=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
