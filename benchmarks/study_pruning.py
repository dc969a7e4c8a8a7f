"""Compare labels of models pruned before and after fine-tuning: ``python -m benchmarks.study_pruning FOLDER``.

A small scgpt is pretrained in ``FOLDER`` on all 700 cells of ``pbmc68k`` without labels, unless it is there already. It
is fine-tuned on 490 of the cells and labels the other 210.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from sklearn.model_selection import train_test_split

import scllm
from benchmarks.study_labels import KEY, SETS, pretrained, read
from scllm.models import CellModel

SMALLER: dict[str, Callable[[CellModel], CellModel]] = {
    "30 % of weights zero": scllm.tl.prune,
    "without 10 % of heads and neurons": lambda model: scllm.tl.prune(model, amount=0.1, structured=True),
    "without 30 % of heads and neurons": lambda model: scllm.tl.prune(model, structured=True),
    "int8": scllm.tl.quantize,
    "int8_dynamic": lambda model: scllm.tl.quantize(model, dtype="int8_dynamic"),
}


def main(folder: Path) -> None:
    scllm.settings.run_dir = folder / "runs"
    warnings.filterwarnings("ignore", message=".*head on 'cell_type'.*prun")
    adata = read(SETS["pbmc68k"])
    model = pretrained(folder, "pbmc68k", "scgpt", "small", adata)
    cells = np.arange(adata.n_obs)
    training, tested = (
        adata[rows].copy() for rows in train_test_split(cells, test_size=0.3, stratify=adata.obs[KEY], random_state=0)
    )
    truth = tested.obs[KEY].astype(str).to_numpy()
    tuned = scllm.tl.finetune(training, model, key=KEY)
    before = labelled(tested, tuned)
    rows = {"not compressed": {"accuracy": (before == truth).mean()}}
    for name, smaller in SMALLER.items():
        labels = labelled(tested, smaller(tuned))
        rows[name] = {"accuracy": (labels == truth).mean(), "same label": (labels == before).mean()}
        if "int8" not in name:  # int8 weights cannot be trained
            again = scllm.tl.finetune(training, smaller(model), key=KEY)
            rows[name]["pruned first"] = (labelled(tested, again) == truth).mean()
            heads = scllm.tl.finetune(training, smaller(model), key=KEY, freeze="encoder", epochs=1)
            rows[name]["pruned first, head only"] = (labelled(tested, heads) == truth).mean()
        print(pd.DataFrame.from_dict(rows, orient="index").round(3).to_string(), flush=True)


def labelled(cells: AnnData, model: CellModel) -> np.ndarray:
    """Predict the label of each cell."""
    return scllm.tl.classify(cells, model, copy=True).obs["scllm_label"].astype(str).to_numpy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
