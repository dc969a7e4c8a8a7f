"""Predict one cell of maximal length with every published size: ``python -m benchmarks.full_size [family ...]``.

Each size runs in its own process on a CPU. It builds the model with a vocabulary of the published size and predicts all
expressed genes of a cell that expresses every gene (truncated to ``max_len``). Its peak memory is printed.
"""

from __future__ import annotations

import sys

from benchmarks._child import call_in_child, peak_rss

__all__ = ["SIZES", "predict_one_cell"]

# Family, size, number of genes in the vocabulary. Gene language models were published for words, so they get
# Geneformer's genes.
SIZES = (
    ("scgpt", "base", 60_694),
    ("scbert", "base", 16_906),
    ("scfoundation", "base", 19_264),
    ("geneformer", "v1-10m", 25_424),
    ("geneformer", "v1-40m", 25_424),
    ("geneformer", "v2-104m", 20_271),
    ("geneformer", "v2-316m", 20_271),
    ("gpt2", "base", 25_424),
    ("gpt2", "gpt2", 25_424),
    ("albert", "base", 25_424),
    ("albert", "albert-base", 25_424),
    ("xlnet", "base", 25_424),
    ("xlnet", "xlnet-base", 25_424),
)
LIMIT = 24 * 2**30


def predict_one_cell(family: str, size: str, n_genes: int) -> tuple[int, int, int, int]:
    """Predict one cell; return the number of weights, the tokens of the vocabulary and of the cell, and peak bytes."""
    import numpy as np
    import torch

    from scllm import models
    from scllm.data.tokens import Tokens
    from scllm.models.base import Batch

    torch.manual_seed(0)
    model = models.build(family, vocab=[f"g{i}" for i in range(n_genes)], size=size).eval()
    genes = model.vocab.gene_ids
    counts = Tokens(
        np.array([0, n_genes]), genes, np.random.default_rng(0).integers(1, 100, n_genes).astype(np.float32)
    )
    batch = Batch.from_tokens(model.encoder(counts, model.vocab, measured=genes))
    with torch.inference_mode():
        found = model.reconstruct(batch, model.is_expressed(batch).nonzero().squeeze(1), hide=False)
    assert found.isfinite().all()
    return model.n_parameters, len(model.vocab), len(batch.genes), peak_rss()


def main(families: list[str]) -> int:
    print("| family | size | vocabulary | weights | tokens of the cell | peak memory |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    peaks = []
    for family, size, n_genes in SIZES:
        if families and family not in families:
            continue
        n_weights, n_vocab, n_tokens, peak = call_in_child(predict_one_cell, family, size, n_genes)
        peaks.append(peak)
        numbers = f"{n_vocab:,} | {n_weights:,} | {n_tokens:,} | {peak / 2**30:.1f} GiB"
        print(f"| `{family}` | `{size}` | {numbers} |", flush=True)
    return int(max(peaks, default=0) > LIMIT)


if __name__ == "__main__":
    from benchmarks.full_size import main as run  # imported by its module name, so that other processes find it

    sys.exit(run(sys.argv[1:]))
