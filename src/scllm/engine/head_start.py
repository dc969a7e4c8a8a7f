"""Starting fresh heads from the data: trained alone on the states that the model gives the training cells, in seconds.

A head that knows nothing pulls the model's states about before it has learnt anything (Kumar et al., "Fine-tuning can
distort pretrained features and underperform out-of-distribution", *ICLR* 2022, arXiv:2202.10054). States of cells lie
close together and vary along few directions, and what tells related types apart is not among those: heads learn from
whitened states, and their first linear layer takes the whitening over at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from scllm._log import log
from scllm._typing import FloatArray, IntArray
from scllm.data.genes import GeneMatch
from scllm.data.source import CellSource
from scllm.engine.objectives import Label
from scllm.engine.predict import predict
from scllm.models.base import CellModel

__all__ = ["start_heads"]

_MAX_CELLS = 100_000  # more cells do not change where a head of this size starts
_EPOCHS, _MIN_STEPS, _MAX_STEPS = 50, 600, 5_000
_BATCH, _LR, _DECAY, _DROPOUT = 128, 1e-3, 0.1, 0.3
_RIDGE = 0.1  # of the mean variance: directions far below it are noise


def start_heads(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    rows: IntArray,
    objective: Label,
    targets: Mapping[str, NDArray[Any]],
    *,
    weights: FloatArray | None,
    device: str,
    random_state: int,
) -> None:
    """Train the heads alone, in place.

    Parameters
    ----------
    model
        With fresh heads.
    source, match
        The cells, and the token of each of their genes.
    rows
        Training cells.
    objective
        What the heads are trained for.
    targets
        Labels and values by name, over all rows of the source.
    weights
        Probability of drawing each of ``rows``; ``None``: all alike.
    device
        Where the model computes; the heads themselves are trained on the CPU.
    random_state
        What the order of the cells is a function of.
    """
    rng = np.random.default_rng(random_state)
    chosen = np.arange(len(rows))
    if len(rows) > _MAX_CELLS:
        chosen = np.sort(rng.choice(chosen, _MAX_CELLS, replace=False))
    parts = predict(
        model, source, match, lambda replica, batch: replica.head_inputs(batch), rows=rows[chosen], device=device,
        precision="fp32", desc="starting the heads: states",
    )  # fmt: skip
    states = torch.cat([values for _, values in parts])
    mean, whiten = _whitening(states)
    columns = {name: torch.from_numpy(column[rows[chosen]]) for name, column in targets.items()}
    probability = None if weights is None else weights[chosen] / weights[chosen].sum()
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.default_generator.manual_seed(random_state)
        _fit(model, (states - mean) @ whiten, columns, objective, probability, rng)
    with torch.no_grad():
        for head in model.heads:
            first = next(layer for layer in head.modules() if isinstance(layer, nn.Linear))
            first.weight.copy_(first.weight @ whiten.T)
            first.bias -= first.weight @ mean


def _whitening(states: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and the matrix ``(d, d)`` by which centred states get variances near one and no correlations."""
    mean = states.mean(0)
    centred = (states - mean).double()
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(states))
    variance = variance.clamp(min=0)
    # states that are the same in all cells say nothing
    scale = (variance + _RIDGE * variance.mean().clamp(min=1e-12)).rsqrt()
    return mean, ((directions * scale) @ directions.T).to(states.dtype)


def _fit(
    model: CellModel,
    states: Tensor,
    targets: Mapping[str, Tensor],
    objective: Label,
    probability: FloatArray | None,
    rng: np.random.Generator,
) -> None:
    n_cells = len(states)
    n_steps = min(_MAX_STEPS, max(_MIN_STEPS, _EPOCHS * math.ceil(n_cells / _BATCH)))
    optimise = torch.optim.AdamW(model.heads.parameters(), lr=_LR, weight_decay=_DECAY)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimise, n_steps)
    model.heads.train()
    step = 0
    while step < n_steps:
        order = rng.permutation(n_cells) if probability is None else rng.choice(n_cells, n_cells, p=probability)
        for cells in torch.from_numpy(order).split(_BATCH)[: n_steps - step]:
            outputs = model.apply_heads(F.dropout(states[cells], _DROPOUT))
            loss = objective.of(model.head_specs, outputs, {name: values[cells] for name, values in targets.items()})
            optimise.zero_grad()
            (loss.sum / loss.count.clamp(min=1)).backward()
            optimise.step()
            fall.step()
            step += 1
    model.heads.eval()
    log.info(
        "the heads start at a loss of %.4g on the last %d training cells they saw, with dropout",
        loss.sum.item() / max(1, int(loss.count)),
        len(cells),
    )
