"""A linear head on frozen hidden states, fitted to convergence on all rows at once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn

from scllm._typing import FloatArray, IntArray
from scllm.engine.objectives.gene_label import weighted_loss
from scllm.engine.objectives.label import LossName

__all__ = ["PENALTIES", "chosen_penalty", "fit_linear_head"]

PENALTIES = (10.0, 1.0, 0.1, 0.01)
"""L2 penalties from which inner cross-validation chooses."""


def fit_linear_head(
    states: FloatArray,
    codes: IntArray,
    n_classes: int,
    *,
    loss: Mapping[LossName, float],
    weights: FloatArray,
    penalty: float,
) -> nn.Linear:
    """Fit a linear head on states ``(n, d)``.

    Columns are standardised for the fit, so that one penalty suits all of them. The returned head takes states that are
    not standardised.

    Parameters
    ----------
    states, codes
        Hidden states, ``(n, d)``, and the class of each row, ``(n,)``.
    n_classes
        Number of outputs of the head.
    loss
        Weight of each loss.
    weights
        Weight of each row.
    penalty
        L2 penalty: half of it times the squared weights is added to the mean loss.
    """
    x, target, weight = torch.from_numpy(states).double(), torch.from_numpy(codes), torch.from_numpy(weights).double()
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 1e-9 * spread.max(), spread, torch.inf)  # constant columns get a weight of zero
    x = (x - mean) / spread
    slope = torch.zeros(n_classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    optimise = torch.optim.LBFGS([slope, offset], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimise.zero_grad()
        value = (
            weighted_loss(x @ slope.T + offset, target, weight, loss) / weight.sum() + penalty / 2 * (slope**2).sum()
        )
        value.backward()
        return value

    optimise.step(closure)
    head = nn.utils.skip_init(nn.Linear, x.shape[1], n_classes)
    with torch.no_grad():
        head.weight.copy_(slope / spread)
        head.bias.copy_(offset - (slope / spread) @ mean)
    return head


def chosen_penalty(
    states: FloatArray,
    codes: IntArray,
    n_classes: int,
    *,
    loss: Mapping[LossName, float],
    weights: FloatArray,
    random_state: int = 0,
    n_folds: int = 3,
) -> float:
    """Choose the penalty with the lowest cross-validated loss; 1 if a class is too small for two folds."""
    n_folds = min(n_folds, int(np.bincount(codes, minlength=n_classes).min()))
    if n_folds < 2:
        return 1.0
    folds = list(StratifiedKFold(n_folds, shuffle=True, random_state=random_state).split(states, codes))
    found = np.zeros(len(PENALTIES))
    for i, penalty in enumerate(PENALTIES):
        for training, test in folds:
            head = fit_linear_head(
                states[training], codes[training], n_classes, loss=loss, weights=weights[training], penalty=penalty
            )
            with torch.no_grad():
                logits = head(torch.from_numpy(states[test]).float())
                rows = torch.from_numpy(codes[test]), torch.from_numpy(weights[test])
                found[i] += float(weighted_loss(logits, *rows, loss))
    return PENALTIES[int(found.argmin())]
