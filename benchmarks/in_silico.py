"""Delete STAT1 and other genes in interferon-stimulated blood cells (Kang et al. 2018): do cells move towards control?

Usage: python -m benchmarks.in_silico CELLS.h5ad OUT.csv. A small model is pretrained on all cells without labels. Each
gene that at least 5 % of the stimulated cells express is deleted in 200 random ones. It is trained for as many steps as
networks of simulated cells need (``python -m benchmarks.planted_network``).
"""

from __future__ import annotations

import sys
import tempfile

import anndata as ad
import numpy as np
import torch

import scllm


def main(path: str, out: str) -> None:
    torch.set_num_threads(1)
    scllm.settings.run_dir = tempfile.mkdtemp()
    adata = ad.read_h5ad(path)
    config = scllm.tl.TrainConfig(steps=2000, warmup=100, schedule="cosine", max_len=256)
    model = scllm.tl.pretrain(adata, "geneformer", size="tiny", lr=1e-3, batch_size=32, device="cpu", config=config)
    stimulated = adata[adata.obs["condition"] == "stim"]
    share = np.asarray((stimulated.X > 0).mean(0)).ravel()
    genes = list(adata.var_names[share >= 0.05])
    scllm.tl.perturb(
        adata, model, genes=genes, n_null=0, groupby="condition", goal=("stim", "ctrl"), max_cells=200, pooling="mean"
    )
    table = adata.uns["scllm"]["perturb"]["table"]
    table.to_csv(out, index=False)
    print(len(table), table[table["perturbation"] == "STAT1"].to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
