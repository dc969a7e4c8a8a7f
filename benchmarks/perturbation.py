"""Score the perturbation model on a CRISPR screen (Papalexi et al. 2021), beside baselines and the replicate ceiling.

Usage: python benchmarks/perturbation.py SCREEN.h5ad OUT.csv. Guides are clean ones (``dominant_guide_fraction`` > 0.8),
at most 50 cells of each target and 300 control cells are used, and 3 random thirds of the targets are held out in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time

import anndata as ad
import numpy as np
import pandas as pd
import torch

import scllm

CONTROL, N_CELLS, N_CONTROL = "non-targeting", 50, 300


def clean_cells(path: str) -> ad.AnnData:
    adata = ad.read_h5ad(path)
    adata = adata[adata.obs["dominant_guide_fraction"] > 0.8].copy()
    rng, kept = np.random.default_rng(0), []
    for name, rows in pd.Series(range(adata.n_obs)).groupby(adata.obs["perturbation"].astype(str).to_numpy()):
        kept += rng.permutation(rows)[: N_CONTROL if name == CONTROL else N_CELLS].tolist()
    return adata[np.sort(kept)].copy()


def main(path: str, out: str) -> None:
    torch.set_num_threads(2)
    scllm.settings.run_dir = tempfile.mkdtemp()
    adata = clean_cells(path)
    controls = adata[adata.obs["perturbation"] == CONTROL].copy()
    began = time.time()
    start = scllm.tl.pretrain(controls, "scgpt", size="tiny", epochs=3, lr=1e-3, device="cpu")
    names = np.random.default_rng(0).permutation(sorted(set(adata.obs["perturbation"].astype(str)) - {CONTROL}))
    tables = []
    for split, held_out in enumerate(np.array_split(names, 3)):
        scllm.tl.fit_perturbation(
            adata,
            start,
            key="perturbation",
            control=CONTROL,
            batch_key="bio_rep",
            held_out=held_out.tolist(),
            epochs=4,
            lr=1e-3,
            device="cpu",
            config=scllm.tl.TrainConfig(max_len=100),
        )
        tables.append(adata.uns["scllm"]["perturbation"]["table"].assign(split=split))
        print(f"split {split}: {time.time() - began:.0f} s in all", flush=True)
        pd.concat(tables).to_csv(out, index=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
