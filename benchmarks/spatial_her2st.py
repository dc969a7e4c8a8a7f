"""Compare predictors of expression from histology: ``python -m benchmarks.spatial_her2st FOLDER``.

The three sections of patient C of the HER2-positive breast tumours of Andersson et al., *Nature Communications* 2021,
doi:10.1038/s41467-021-26271-2, each held out in turn. Genes are chosen and language models trained on the training
sections of each fold. Everything is kept in ``FOLDER``: a run that was interrupted goes on after its last training.
``--small`` runs all parts on two small simulated sections. ``--settings`` trains the language model with other learning
rates and batch sizes, on simulated sections as large as the real ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import torch
from anndata import AnnData

import scllm
from benchmarks._cells import SHARED

SECTIONS = ("C2", "C3", "C4")
FEWEST_COUNTS = 200  # spots with fewer are left out
# genes of a family, by the beginning of their names
FAMILIES = {"collagens": "COL", "keratins": "KRT", "MHC": "HLA-", "immunoglobulins": "IG", "ribosome": ("RPL", "RPS")}
FULL = {"n_top_genes": 128, "size": "small", "epochs": 15, "lm_size": "tiny", "lm_epochs": 20, "n_resamples": 200}
SMALL = {"n_top_genes": 12, "size": "tiny", "epochs": 1, "lm_size": "tiny", "lm_epochs": 1, "n_resamples": 5}
# part -> language model, predictors, seeds, training sections, and what the predictors read
PARTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "lm": "gpt2",
        "kinds": ["none", "gaussian", "random", "permuted", "feature", "match", "nll"],
        "n_seeds": 3,
    },
    "scgpt": {"lm": "scgpt", "kinds": ["none", "masked"], "n_seeds": 3},
    "weight 1": {"lm": "gpt2", "kinds": ["none", "feature", "match"], "n_seeds": 1, "weight": 1.0},
    "one section": {"lm": "gpt2", "kinds": ["none", "feature"], "n_seeds": 1, "n_train_groups": 1},
    "pixels": {"lm": "gpt2", "kinds": ["none", "feature"], "n_seeds": 1, "use_rep": None, "n_neighbors": 0},
}
SHOWN = [
    "arm", "n_fits", "pcc", "pcc_difference", "pcc_low", "pcc_high", "correlation_error",
    "correlation_error_difference", "correlation_error_low", "correlation_error_high", "variance_ratio",
    "morans_i_error", "pathway_pcc", "auroc_real",
]  # fmt: skip


def main(folder: Path, *, small: bool = False) -> None:
    """Run all parts and print their tables."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    adata = toy() if small else sections()
    sets = {name: [gene for gene in adata.var_names if gene.startswith(start)] for name, start in FAMILIES.items()}
    settings = {**(SMALL if small else FULL), "gene_sets": sets, "device": "cpu"}
    for name, table in compared(adata, folder, settings, n_seeds=1 if small else None):
        table.to_csv(folder / f"{name.replace(' ', '_')}.csv", index=False)
        print(f"\n{name}, after {time.monotonic() - began:.0f} s\n")
        print(table[[column for column in SHOWN if column in table]].round(4).to_string(index=False), flush=True)


def compared(
    adata: AnnData, folder: Path, settings: dict[str, Any], n_seeds: int | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the table of each part; runs that two parts share are trained once."""
    for name, part in PARTS.items():
        options = {**part, "n_seeds": n_seeds or part["n_seeds"]}
        yield name, scllm.tl.ablate_spatial(adata, run_dir=folder / "runs", **options, **settings)
        adata.uns["scllm"]["ablate_spatial"]["fits"].to_csv(folder / f"{name.replace(' ', '_')}_fits.csv", index=False)


def sections() -> AnnData:
    """Read the sections, with features of an untrained ResNet-18 and patches of 56 pixels."""
    files = SHARED / "spatial_her2st"
    parts = {name: ad.read_h5ad(files / f"{name}.h5ad") for name in SECTIONS}
    adata = ad.concat(parts.values())
    adata = adata[adata.X.sum(axis=1).A1 >= FEWEST_COUNTS].copy()
    adata.uns["spatial"] = {name: part.uns["spatial"][name] for name, part in parts.items()}
    return described(adata, {name: files / f"{name}_HE.jpg" for name in SECTIONS}, pixels=(112, 56))


def toy() -> AnnData:
    return described(scllm.datasets.toy_spatial(n_sections=2, side=6, n_genes=16), None, pixels=(32, 16))


def lm_settings(folder: Path) -> None:
    """Print the nats per gene of language models trained with other settings, on a simulated section held out."""
    adata = scllm.datasets.toy_spatial(n_sections=3, side=14, n_genes=FULL["n_top_genes"])
    held_out = (adata.obs["section"] == "section3").to_numpy()
    torch.manual_seed(0)  # of the new weights
    lm = scllm.models.build("gpt2", vocab=adata.var_names, size=FULL["lm_size"], dropout=0.0)
    config = scllm.tl.TrainConfig(schedule="cosine", warmup=20)
    options: list[dict[str, Any]] = [{}]
    options += [
        {"lr": lr, "batch_size": size, "config": config}
        for lr, size in ((1e-3, 16), (3e-3, 16), (1e-2, 16), (3e-3, 32), (1e-2, 32))
    ]
    for given in options:
        run_dir = folder / f"lm-{given.get('lr')}-{given.get('batch_size')}"
        trained = scllm.tl.pretrain(
            adata[~held_out].copy(), lm, epochs=FULL["lm_epochs"], device="cpu", run_dir=run_dir, **given
        )
        unseen = adata[held_out].copy()
        scllm.tl.perplexity(unseen, trained)
        nats = unseen.obs["perplexity_nats"].mean()
        print(f"lr={given.get('lr')}, batch_size={given.get('batch_size')}: {nats:.3f} nats per gene", flush=True)


def described(adata: AnnData, image: dict[str, Path] | None, pixels: tuple[int, int]) -> AnnData:
    """Compute features of larger patches, and leave smaller ones for the network that reads pixels."""
    scllm.pp.image_patches(adata, image=image, pixels=pixels[0])
    scllm.tl.embed_patches(adata, encoder="resnet18", pretrained=False, device="cpu")
    scllm.pp.image_patches(adata, image=image, pixels=pixels[1])
    return adata


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spatial_her2st", description=__doc__)
    parser.add_argument("folder", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--small", action="store_true", help="two small simulated sections")
    which.add_argument("--settings", action="store_true", help="settings of the language model on simulated sections")
    chosen = parser.parse_args()
    if chosen.settings:
        lm_settings(chosen.folder)
    else:
        main(chosen.folder, small=chosen.small)
