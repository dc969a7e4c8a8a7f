"""Compare a compressed model with the original: sizes, operations, speed and agreement."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from itertools import count

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.random import Generator
from scipy import sparse
from torch import Tensor

from scllm._log import details, log
from scllm._typing import FloatArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.data.source import open_source
from scllm.engine.predict import predict
from scllm.metrics import agreement
from scllm.models.base import Batch, CellModel
from scllm.models.storage import bytes_on_disk
from scllm.tl._model import gene_match

__all__ = ["report"]

# simulated cells, like those of the toy data, but with genes of the model's vocabulary
_N_GENES, _N_TYPES = 200, 4
_MARKER_FOLD, _COUNTS_PER_GENE = 12.0, 0.8
_FEWEST, _MOST = 8, 96
_MAX_LEN = 1024
# floating-point operations to spend on one model: a few seconds on one core
_BUDGET = 3e11
# minimum number of timings of each model, and the time until which fast models are timed again
_REPEATS, _SECONDS = 3, 1.0


def report(before: CellModel, after: CellModel) -> pd.DataFrame:
    """Measure sizes, operations, speed and agreement on simulated cells, with the rows ``before`` and ``after``.

    Cells are simulated as in :func:`scllm.datasets.toy`: Poisson counts of four types with marker genes, for 200 genes
    spread evenly over the vocabulary. There are 96 cells, or fewer for large models, and at most 1,024 tokens per cell.
    """
    adata = _simulated(before, np.random.default_rng(0))
    k = min(15, adata.n_obs // 6)  # with few cells, nearly all would be neighbours
    source = open_source(adata)
    match = gene_match(adata, source, before)
    probes = {"before": _shortened(before), "after": _shortened(after)}
    with details():
        found = {name: _outputs(source, match, probe) for name, probe in probes.items()}
        speed = _cells_per_s(source, match, probes)
    labels, n_tokens = found["before"]["label"], found["before"]["n_tokens"].mean()
    rows = {}
    for name, model in (("before", before), ("after", after)):
        rows[name] = {
            "bytes_on_disk": bytes_on_disk(model),
            "bytes_in_memory": sum(x.nbytes for x in (*model.parameters(), *model.buffers())),
            "n_parameters": model.n_parameters,
            "flops_per_cell": model.forward_flops(float(n_tokens)),
            "cells_per_s": speed[name],
            **agreement(found[name]["embedding"], found["before"]["embedding"], n_neighbors=max(1, k)),
        }
        if labels.min() >= 0:
            rows[name]["same_label"] = float((found[name]["label"] == labels).mean())
    table = pd.DataFrame.from_dict(rows, orient="index")
    ratio = table.loc["before"] / table.loc["after"]
    log.info(
        "comparing on simulated cells: %.1f times smaller on disk, %.2f times the speed, mean cosine similarity to the "
        "original embeddings %.4f",
        ratio["bytes_on_disk"],
        1 / ratio["cells_per_s"],
        table.loc["after", "cosine_mean"],
    )
    return table


def _shortened(model: CellModel) -> CellModel:
    """Return the model with a shorter ``max_len``; weights are shared."""
    probe = copy.copy(model)
    probe.encoder = replace(model.encoder, max_len=min(model.encoder.max_len, _MAX_LEN))  # type: ignore[type-var]
    return probe


def _simulated(model: CellModel, rng: Generator) -> AnnData:
    """Simulate cells with known markers, for genes of the model's vocabulary."""
    genes = list(model.vocab.genes)
    genes = genes[:: max(1, len(genes) // _N_GENES)][:_N_GENES]
    flops = _shortened(model).forward_flops(_N_GENES)
    n_cells = int(np.clip(_BUDGET / max(flops, 1.0), _FEWEST, _MOST))
    level = rng.lognormal(0, 0.8, len(genes))
    fold = np.where(rng.integers(0, 2 * _N_TYPES, len(genes)) == np.arange(_N_TYPES)[:, None], _MARKER_FOLD, 1.0)
    rates = fold[np.arange(n_cells) % _N_TYPES] * level / level.mean() * _COUNTS_PER_GENE
    counts = rng.poisson(rates * rng.lognormal(0, 0.3, (n_cells, 1))).astype(np.float32)
    counts[:, 0] += counts.sum(1) == 0  # every cell needs at least one gene
    return AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=pd.Index(genes, dtype=str)))


def _outputs(source: CellSource, match: GeneMatch, model: CellModel) -> dict[str, FloatArray]:
    """Compute the embedding, the label (of the first head with classes; -1 if none) and the length of each cell."""
    key = next((spec.key for spec in model.head_specs if spec.classes is not None and spec.level == "cell"), None)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        embedding = replica.embed(batch).float()
        label = embedding.new_full((batch.n_cells,), -1)
        if key is not None:
            label = replica.head_outputs(batch)[key].argmax(1).float()
        lengths = batch.cu_seqlens.diff().float()
        return torch.cat([embedding, label[:, None], lengths[:, None]], dim=1)

    parts = predict(model, source, match, forward, desc="comparing")
    found = torch.cat([part for _, part in parts]).numpy()
    return {"embedding": found[:, :-2], "label": found[:, -2], "n_tokens": found[:, -1]}


def _cells_per_s(source: CellSource, match: GeneMatch, models: dict[str, CellModel]) -> dict[str, float]:
    """Measure cells per second in the forward pass only.

    Models are timed in turn and the best time counts, because the speed of a machine varies.
    """
    rows, best = np.arange(max(2, source.n_obs // 4)), dict.fromkeys(models, np.inf)
    began_at = time.perf_counter()
    for n_timings in count():
        if n_timings >= _REPEATS and time.perf_counter() - began_at > _SECONDS:
            break
        for name, model in models.items():
            passes: list[float] = []

            def forward(replica: CellModel, batch: Batch, passes: list[float] = passes) -> Tensor:
                began = time.perf_counter()
                embedding = replica.embed(batch).float().cpu()  # waits for the GPU to finish
                passes.append(time.perf_counter() - began)
                return embedding

            for _part in predict(model, source, match, forward, rows=rows, desc="timing"):
                pass
            best[name] = min(best[name], sum(passes))
    return {name: len(rows) / seconds for name, seconds in best.items()}
