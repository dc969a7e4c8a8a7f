"""Row 13: two CPU processes (gloo), compared with one process with two threads and the same global batch."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks._cells import blood_1200
from benchmarks._timing import Ratio, Row
from scllm import tl

N_CELLS, BATCH, N_STEPS, N_START, ROUNDS = 512, 32, 24, 4, 5
TARGET, TOLERANCE = 0.85, 1e-5


def run() -> Row:
    torch.set_num_threads(2)
    histories = [(trained(2), trained(1)) for _ in range(ROUNDS)]
    two, one = (tuple(_seconds_a_cell(pair[i]) for pair in histories) for i in (0, 1))
    ratio = Ratio(two, one)
    curves = [history["loss"].to_numpy() for history in histories[0]]
    apart = float(np.max(np.abs(curves[0] - curves[1]) / curves[1]))
    return Row(
        number=13,
        what=f"tl.pretrain, 2 processes (gloo), scGPT small, {BATCH} blood cells per step, wall time of steps",
        beside="1 process with 2 threads, the same global batch",
        ratio=str(ratio),
        absolute=f"{1 / np.median(two):.0f} and {1 / np.median(one):.0f} cells/s; loss curves {apart:.1e} apart",
        share_of_roof=f"{ratio.median:.0%} of one process on two cores",
        target=f">= {TARGET}x, same loss curve to {TOLERANCE}",
        is_met=ratio.median >= TARGET and apart <= TOLERANCE,
    )


def trained(n_procs: int) -> pd.DataFrame:
    """Train a short run and return its history, including the first steps."""
    adata = blood_1200()[:N_CELLS].copy()
    with tempfile.TemporaryDirectory() as folder:
        config = tl.TrainConfig(steps=N_STEPS, batch_size=BATCH, relational=False)
        model = tl.pretrain(
            adata, size="small", dropout=0, validation=0, device="cpu", n_procs=n_procs, precision="fp32",
            run_dir=Path(folder) / "run", config=config,
        )  # fmt: skip
    assert model.history is not None
    return model.history[model.history["split"] == "train"]


def _seconds_a_cell(history: pd.DataFrame) -> float:
    """Compute the seconds per cell of the median step, without the first steps, in which processes warm up."""
    return float(1 / history["cells_per_s"].iloc[N_START:].median())
