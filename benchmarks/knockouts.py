"""Score gene networks against knock-outs of a CRISPR screen (Papalexi et al. 2021), beside networks of expression.

Usage: python -m benchmarks.knockouts SCREEN.h5ad OUT.csv. Model and networks see control cells only. A reference edge
leads from a knocked-out gene to each gene that changes significantly against control cells of the same batch.
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
from benchmarks._cells import CONTROL, screen
from scllm.tl._perturbed_cells import changes, log_normalised, read_screen


def main(path: str, out: str) -> None:
    torch.set_num_threads(1)
    scllm.settings.run_dir = tempfile.mkdtemp()
    adata, controls = screen(path)
    began = time.time()
    # the defaults, whose networks of simulated cells are the best (python -m benchmarks.planted_network)
    model = scllm.tl.pretrain(controls, "scgpt", size="tiny", device="cpu")
    print(f"pretrained in {time.time() - began:.0f} s", flush=True)
    reference = knockouts(adata, model)
    print(reference.groupby("source")["change"].agg(["size", lambda of: int((of > 0).sum())]).to_string(), flush=True)
    tables = []
    for method in ("attention", "similarity", "perturb"):
        cells = controls.copy()
        scllm.tl.infer_grn(cells, model, method=method, reference=reference, device="cpu")
        entry = cells.uns["scllm"]["grn"]
        tables.append(entry["scores"].assign(network=method))
        pd.concat(tables).to_csv(out, index=False)
        print(f"{method}: {time.time() - began:.0f} s in all", flush=True)
        print(entry["scores"].to_string(), flush=True)
        if method == "perturb":
            print(signs(entry["table"], reference), flush=True)


def knockouts(adata: ad.AnnData, model: scllm.models.CellModel) -> pd.DataFrame:
    """Return the significant changes of measured genes after the knock-out of measured genes."""
    from scllm.data.genes import match
    from scllm.data.source import open_source

    source = open_source(adata)
    found = match(source.genes, model.vocab)
    names = np.array(model.vocab.tokens, dtype=object)[found.measured]
    screen = read_screen(adata, "perturbation", CONTROL, "bio_rep")
    known = [p for p, name in enumerate(screen.names) if name in set(names)]
    measured = changes(log_normalised(source, found, np.arange(adata.n_obs)), screen, known)
    is_other = names[None] != np.array([screen.names[p] for p in known], dtype=object)[:, None]
    row, gene = np.nonzero(measured.significant(is_other))
    sources = [screen.names[known[i]] for i in row]
    return pd.DataFrame({"source": sources, "target": names[gene], "change": measured.change[row, gene]})


def signs(edges: pd.DataFrame, reference: pd.DataFrame) -> str:
    """Say how many edges of knocked-out genes are true, and how many of these have the right sign."""
    of = edges[edges["source"].isin(reference["source"])].merge(reference, on=["source", "target"], how="left")
    hits = of.dropna(subset="change")
    right = int((np.sign(hits["change"]) == -hits["sign"]).sum())
    return f"{len(of)} edges of knocked-out genes, {len(hits)} of them true, {right} of these with the right sign"


if __name__ == "__main__":
    main(*sys.argv[1:])
