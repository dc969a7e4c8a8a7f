"""Compare the labels of int8 models with those of their originals: ``python -m benchmarks.study_int8 [SET ...]``.

The data are the sets of ``study_labels``, with up to 1,400 cells each. The models are ``scgpt-base`` and
``geneformer-v1-10m`` of ``study_compression`` (full size, untrained blocks, gene table of the data's singular vectors).
Each half of the cells is labelled by a head trained on the other half.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from sklearn.model_selection import train_test_split
from torch import Tensor

import scllm
from benchmarks.study_compression import MAX_LEN, MODELS
from benchmarks.study_labels import KEY, SETS, read
from scllm.data.source import open_source
from scllm.engine.predict import predict
from scllm.models import CellModel
from scllm.models.batch import Batch
from scllm.models.int8 import to_int8
from scllm.models.storage import bytes_on_disk
from scllm.tl._model import gene_match

MAX_CELLS = 1_400


def main(names: list[str]) -> None:
    rows = []
    for name in names:
        halves = stratified_halves(read(SETS[name]))
        for model_name in ("geneformer-v1-10m", "scgpt-base"):
            found = []
            for training, tested in (halves, halves[::-1]):
                model = MODELS[model_name](training)
                model.encoder = replace(model.encoder, max_len=MAX_LEN)
                with tempfile.TemporaryDirectory() as folder:
                    tuned = scllm.tl.finetune(training, model, key=KEY, freeze="encoder", epochs=1, run_dir=folder)
                torch.set_num_threads(1)  # numba kernels set torch's number of threads to their own
                found.append(compared(tuned, tested))
            size = [tested.n_obs for tested in halves[::-1]]
            rows.append(mean_of_halves(found, size).assign(set=name, model=model_name))
            print(pd.concat(rows).round(5).to_string(), flush=True)


def stratified_halves(adata: AnnData) -> list[AnnData]:
    """Split cells into two halves, stratified by label."""
    cells = np.arange(adata.n_obs)
    if adata.n_obs > MAX_CELLS:
        cells, _ = train_test_split(cells, train_size=MAX_CELLS, stratify=adata.obs[KEY], random_state=0)
    halves = train_test_split(cells, train_size=0.5, stratify=adata.obs[KEY].iloc[cells], random_state=0)
    return [adata[np.sort(half)].copy() for half in halves]


def mean_of_halves(found: list[pd.DataFrame], size: list[int]) -> pd.DataFrame:
    """Average scores over the cells of both halves; for the lowest cosine, take the minimum."""
    mean = sum(rows * n for rows, n in zip(found, size, strict=True)) / sum(size)
    lowest = pd.concat([rows["cosine_min"] for rows in found], axis=1).min(axis=1)
    return mean.assign(cosine_min=lowest)


def compared(model: CellModel, cells: AnnData) -> pd.DataFrame:
    """Compare the original with each int8 variant, one per row."""
    rows, reference, answers = {}, np.empty(0), np.empty(0)
    truth = cells.obs[KEY].astype(str).to_numpy()
    for kind in ("original", "int8", "int8_dynamic"):
        one = copy.deepcopy(model)
        if kind != "original":
            to_int8(one, kind)
        embedding, labels = embedded_and_labelled(one, cells)
        if kind == "original":
            reference, answers = embedding, labels
        rows[kind] = {
            "MB": bytes_on_disk(one) / 1e6,
            "x smaller": bytes_on_disk(model) / bytes_on_disk(one),
            "accuracy": (labels == truth).mean(),
            "same label": (labels == answers).mean(),
            **scllm.metrics.agreement(embedding, reference),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def embedded_and_labelled(model: CellModel, cells: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Compute embeddings ``(n, d)`` and labels ``(n,)`` in one pass."""
    source = open_source(cells)
    parts = predict(model, source, gene_match(cells, source, model), both)
    found = torch.cat([values for _, values in parts])
    classes = np.array(model.head_specs[0].classes)
    embedding, logits = found[:, : -len(classes)].numpy(), found[:, -len(classes) :].numpy()
    return embedding, classes[logits.argmax(axis=1)]


def both(model: CellModel, batch: Batch) -> Tensor:
    """Compute the family's default embedding, followed by the logits of the head, ``(b, d + k)``."""
    first, last = model.first_and_last(batch)
    read = torch.cat([model.head_state(states, batch) for states in (first, last)], dim=1)
    return torch.cat([model.pool(last, batch, model.pooling), model.apply_heads(read)[KEY]], dim=1)


if __name__ == "__main__":
    pd.set_option("display.width", 250)
    main(sys.argv[1:] or list(SETS))
