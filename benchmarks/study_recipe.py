"""Compare freezing, upsampling, losses and adapters in fine-tuning: ``python -m benchmarks.study_recipe FOLDER [SET]``.

Five-fold cross-validation on one of the sets of ``study_labels``, with the same folds for every combination of
settings. A scgpt of ``size="tiny"`` is pretrained in ``FOLDER``, unless it is there already. Finished parts in
``FOLDER`` are not run again.
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import torch

import scllm
from benchmarks.study_labels import KEY, SETS, pretrained, read

FREEZE = {"nothing": 0, "half of the blocks": 1, "all but the head": "encoder"}
LOSSES = ("ce", "bce", "dice", "focal")


def main(folder: Path, name: str) -> None:
    adata = read(SETS[name])
    model = pretrained(folder, name, "scgpt", "tiny", adata)
    rows = []
    for (frozen, freeze), lora, upsample, loss in product(FREEZE.items(), (None, 8), (False, True), LOSSES):
        if lora and (freeze == "encoder" or upsample):
            continue  # a frozen encoder has no adapters, and adapters were not tried with upsampling
        scores = scllm.tl.cross_validate(
            adata, model, key=KEY, baseline=False, freeze=freeze, lora=lora, upsample=upsample, loss=loss,
            run_dir=folder / f"{name}-recipe" / f"{freeze}-{lora}-{upsample}-{loss}",
        )  # fmt: skip
        rows.append({
            "frozen": frozen, "LoRA": lora or "", "upsampled": "yes" if upsample else "", "loss": loss,
            **scores[["accuracy", "macro_f1", "balanced_accuracy", "ece"]].mean(),
        })  # fmt: skip
        print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "pbmc68k")
