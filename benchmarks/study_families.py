"""Every family, tiny, on sorted blood cells: ``python -m benchmarks.study_families [EPOCHS [FAMILY ...]]``.

Pretrains ``size="tiny"`` on the 1,200 most variable genes of 3,874 cells, and prints how the validation loss falls and
how well Leiden clusters of each embedding agree with the sorted cell types, beside PCA of the same genes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd

import scllm
from benchmarks.study_blood import KEY, sorted_cells

# learning rates of small models; what a family does not name it takes from its own defaults
SETTINGS: dict[str, dict] = {
    "scgpt": {"lr": 1e-3, "mask_ratio": 0.5, "left_out": 0.25},
    "geneformer": {"lr": 2e-3},
    "scbert": {"lr": 1e-3},
    "scfoundation": {"lr": 1e-3},
    "gpt2": {"lr": 1e-3},
    "albert": {"lr": 1e-3},
    "xlnet": {"lr": 1e-3},
}


def main(epochs: int, families: list[str]) -> None:
    adata = sorted_cells()
    scllm.pp.recipe_scgpt(adata)
    adata.X = adata.layers["counts"]
    rows = {"PCA": scored(adata, "X_pca")}
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            model = scllm.tl.pretrain(
                adata, family, size="tiny", epochs=epochs, batch_size=32, validation=0.1, run_dir=Path(folder) / "run",
                config=scllm.tl.TrainConfig(schedule="cosine", warmup=30), **SETTINGS[family],
            )  # fmt: skip
            losses = model.history.query("split == 'validation'")["loss"]
            own = scored_embedding(adata, model, None)
            mean = scored_embedding(adata, model, "mean")
        falls = {"first": losses.iloc[0], "last": losses.iloc[-1]}
        rows[family] = falls | own | {f"{name} (mean)": value for name, value in mean.items()}
        print(pd.DataFrame.from_dict(rows, orient="index").round(3).to_string(), flush=True)


def scored_embedding(adata, model, pooling) -> dict[str, float]:
    """Agreement of clusters with cell types, and the accuracy of neighbours."""
    scllm.tl.embed(adata, model, pooling=pooling)
    return scored(adata, "X_scllm")


def scored(adata, use_rep: str) -> dict[str, float]:
    """NMI, ARI and the accuracy of nearest neighbours of one embedding."""
    table = scllm.tl.benchmark(adata, use_rep=use_rep, key=KEY)
    return table.loc[use_rep, ["nmi", "ari", "knn_accuracy"]].to_dict()


if __name__ == "__main__":
    pd.set_option("display.width", 200)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4, sys.argv[2:] or list(SETTINGS))
