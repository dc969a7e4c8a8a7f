"""Compare compressed models with their originals: ``python -m benchmarks.study_compression [MODEL ...]``.

A model can be

- a folder, such as those written by ``study_blood`` and ``scllm demo``;
- ``scgpt-base`` (12 x 8 x 512, 60,697 tokens) or ``geneformer-v1-10m`` (6 x 4 x 256, 25,426 tokens), with untrained
  blocks and a gene table of the data's singular vectors;
- ``scgpt-small`` or ``geneformer-small``, fine-tuned on 1,500 sorted blood cells, which takes minutes.

They embed and label other blood cells (``pbmc_zheng2017_facs.h5ad`` in ``SCLLM_SHARED``; the model of ``scllm demo``
those of the demo). Matrix products are counted with torch's ``FlopCounterMode``; times are CPU-seconds of the process.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import scllm
from benchmarks.study_blood import KEY, sorted_cells
from scllm.data.source import open_source
from scllm.engine.gene_init import start_from_data
from scllm.engine.predict import predict
from scllm.models import CellModel
from scllm.models.int8 import to_int8
from scllm.models.pruning import prune_structured, prune_weights
from scllm.models.storage import bytes_on_disk
from scllm.tl._model import gene_match

N_TIMED = 12
N_CELLS = {"scgpt-base": 200, "geneformer-v1-10m": 200}
N_HELD_OUT, N_TRAINING = 300, 1_500
# limits the tokens per cell, because sorted cells have some 500 genes and one core is slow
MAX_LEN = 129
VARIANTS: dict[str, Callable[[CellModel], None]] = {
    "original": lambda model: None,
    "int8": lambda model: to_int8(model, "int8"),
    "int8_dynamic": lambda model: to_int8(model, "int8_dynamic"),
    "30 % of weights zero": lambda model: prune_weights(model, 0.3),
    "without 30 % of heads and neurons": lambda model: prune_structured(model, 0.3),
}


def main(names: list[str]) -> None:
    adata = sorted_cells()
    order = np.random.default_rng(0).permutation(adata.n_obs)
    held_out, rest = adata[order[:N_HELD_OUT]].copy(), adata[order[N_HELD_OUT : N_HELD_OUT + N_TRAINING]].copy()
    for name in names:
        cells = held_out[: N_CELLS.get(name, N_HELD_OUT)].copy()
        model = MODELS[name](rest) if name in MODELS else scllm.models.load(name)
        if model.head_specs and not set(cells.obs[KEY]) <= set(model.head_specs[0].classes or ()):
            cells = scllm.datasets.pbmc68k()  # the cells that `scllm demo` fine-tunes on
        model.encoder = replace(model.encoder, max_len=MAX_LEN)
        print(f"\n{name}", flush=True)
        torch.set_num_threads(1)  # numba kernels set torch's number of threads to their own
        print(table(model, cells).to_string(), flush=True)


def table(model: CellModel, cells: AnnData) -> pd.DataFrame:
    """Compare all variants of a model, one per row."""
    smaller = {name: copy.deepcopy(model) for name in VARIANTS}
    for name, make in VARIANTS.items():
        make(smaller[name])
    speed = cells_per_s(smaller, cells[:N_TIMED].copy())
    rows, reference = {}, None
    for name, one in smaller.items():
        embedding = scllm.tl.embed(cells, one, copy=True).obsm["X_scllm"]
        reference = embedding if reference is None else reference
        rows[name] = {
            "MB": bytes_on_disk(one) / 1e6,
            "weights": one.n_parameters,
            "GFLOP": counted_flops(one, cells[:4].copy()) / 4e9,
            "cells/s": speed[name],
            **scllm.metrics.agreement(embedding, reference),
        }
        probed = scllm.metrics.logistic_regression_scores(embedding, cells.obs[KEY].astype(str))
        rows[name]["linear probe"] = probed["accuracy"]
        if one.head_specs:
            labelled = scllm.tl.classify(cells, one, key_added="label", copy=True)
            rows[name]["accuracy"] = float((labelled.obs["label"].astype(str) == cells.obs[KEY].astype(str)).mean())
    found = pd.DataFrame.from_dict(rows, orient="index")
    found["x smaller"] = found["MB"].iloc[0] / found["MB"]
    found["x faster"] = found["cells/s"] / found["cells/s"].iloc[0]
    return found.round(4)


def cells_per_s(smaller: dict[str, CellModel], cells: AnnData) -> dict[str, float]:
    """Measure the best speed out of three rounds, in which all variants alternate."""
    source, best = open_source(cells), dict.fromkeys(smaller, np.inf)
    for _ in range(3):
        for name, model in smaller.items():
            began = time.process_time()  # not wall time, because other programs may share the cores
            for _part in predict(model, source, gene_match(cells, source, model), lambda m, b: m.embed(b)):
                pass
            best[name] = min(best[name], time.process_time() - began)
    return {name: cells.n_obs / seconds for name, seconds in best.items()}


def counted_flops(model: CellModel, cells: AnnData) -> float:
    """Count the operations of matrix products in all blocks, for all tokens."""
    source = open_source(cells)
    # torch does not count the CPU's fused attention kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _part in predict(
            model, source, gene_match(cells, source, model), lambda m, b: m.hidden(b)[b.first.clamp(max=0)]
        ):
            pass
    return float(counter.get_total_flops())


def started(family: str, n_genes: int, size: str) -> Callable[[AnnData], CellModel]:
    """Build a model with untrained blocks and a gene table from the data; unmeasured genes fill up the vocabulary."""

    def make(adata: AnnData) -> CellModel:
        others = [f"unmeasured{i}" for i in range(n_genes - adata.n_vars)]
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            model = scllm.models.build(family, vocab=[*adata.var_names, *others], size=size).eval()
        source = open_source(adata)
        start_from_data(model, source, gene_match(adata, source, model), np.arange(adata.n_obs))
        return model

    return make


def tuned(family: str, **settings) -> Callable[[AnnData], CellModel]:
    """Fine-tune a model whose gene table is initialised with the data's singular vectors."""

    def make(adata: AnnData) -> CellModel:
        model = started(family, adata.n_vars, "small")(adata)
        with tempfile.TemporaryDirectory() as folder:
            return scllm.tl.finetune(
                adata, model, key=KEY, run_dir=Path(folder) / "run",
                config=scllm.tl.TrainConfig(max_len=129, warmup=30, schedule="cosine"), **settings,
            )  # fmt: skip

    return make


MODELS: dict[str, Callable[[AnnData], CellModel]] = {
    "geneformer-v1-10m": started("geneformer", 25_424, "v1-10m"),
    "scgpt-base": started("scgpt", 60_694, "base"),
    "geneformer-small": tuned("geneformer", epochs=3, lr=1e-3),
    "scgpt-small": tuned("scgpt", epochs=3, lr=1e-3),
}


if __name__ == "__main__":
    pd.set_option("display.width", 250)
    pd.set_option("display.max_columns", 20)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1:] or list(MODELS))
