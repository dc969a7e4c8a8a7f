"""Compare training on whole cells and on 512 random tokens of each cell: ``python -m benchmarks.training_length``.

Prints CPU-seconds of training, the validation loss (on whole cells in both cases), and the accuracy of nearest
neighbours and of a linear probe on the embedding of whole cells, with PCA of the same cells for comparison.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pandas as pd
from anndata import AnnData, read_h5ad

from benchmarks._cells import SHARED
from scllm import tl

__all__ = ["compare"]

WHOLE, PART = 100_000, 512  # no cell has 100,000 tokens
# data, cells, family, size, epochs
RUNS = (
    ("celllines_scmixology_celseq2_5lines", 500, "scgpt", "tiny", 4),
    ("pbmc_zheng2017_facs", 1500, "geneformer", "tiny", 3),
    ("celllines_scmixology_celseq2_5lines", 500, "scgpt", "small", 1),
)


def compare(adata: AnnData, family: str, size: str, epochs: int, max_len: int) -> tuple[float, float, pd.DataFrame]:
    """Train a model; return CPU-seconds of training, validation loss, and the scores of both embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        model = tl.pretrain(
            adata, family, size=size, epochs=epochs, run_dir=f"{folder}/run", validation=0.1, device="cpu",
            config=tl.TrainConfig(max_len=max_len, relational=False),
        )  # fmt: skip
        seconds = time.process_time() - began
        tl.embed(adata, model, device="cpu")
    assert model.history is not None
    loss = model.history.query("split == 'validation'")["loss"].min()
    return seconds, loss, tl.benchmark(adata, key="cell_type")


def main() -> None:
    columns = ("data", "model", "epochs", "tokens in training", "CPU-seconds", "validation loss", "neighbours, probe")
    print(_line(columns), _line(["---"] * len(columns)), sep="\n", flush=True)
    for data, n_cells, family, size, epochs in RUNS:
        adata = read_h5ad(SHARED / f"{data}.h5ad")
        adata = adata[np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:n_cells])].copy()
        for max_len in (WHOLE, PART):
            seconds, loss, scores = compare(adata.copy(), family, size, epochs, max_len)
            tokens = "all" if max_len == WHOLE else f"at most {max_len}"
            run = (f"{data}, {n_cells} cells", f"{family} {size}", f"{epochs}", tokens, f"{seconds:.0f}", f"{loss:.4g}")
            print(_line([*run, _accuracies(scores, "X_scllm")]), flush=True)
        print(_line([f"{data}, {n_cells} cells", "PCA", *[""] * 4, _accuracies(scores, "X_pca")]), flush=True)


def _accuracies(scores: pd.DataFrame, embedding: str) -> str:
    return ", ".join(f"{scores.loc[embedding, name]:.3f}" for name in ("knn_accuracy", "logreg_accuracy"))


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
