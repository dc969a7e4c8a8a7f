"""Initialisation of new heads by logistic regression on frozen embeddings of the training cells, in seconds.

Gradients from a randomly initialised head distort the pretrained features before the head has learnt anything (Kumar et
al., "Fine-tuning can distort pretrained features and underperform out-of-distribution", *ICLR* 2022, arXiv:2202.10054).

Embeddings of cells are close to each other and vary along few directions, which do not separate related cell types.
Heads are therefore fitted on whitened embeddings, and the whitening is merged into their first linear layer afterwards.
A linear head is then a logistic regression on the embeddings. As in linear discriminant analysis, the variance within
labels is whitened: it comes from depth, donor and batch, while the head needs the variance between labels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from scllm._log import log
from scllm._typing import IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.engine.objectives import Label
from scllm.engine.predict import predict
from scllm.engine.spec import Cells
from scllm.models.base import CellModel, HeadSpec

__all__ = ["start_heads", "whitening"]

_MAX_CELLS = 100_000  # per head; more cells do not change the result for a head of this size
_MAX_STEPS = 300
# L2 penalty on the summed loss (half of it times the squared weights), like C = 0.1 in scikit-learn's logistic
# regression
_PENALTY = 10.0
_RIDGE = 0.3  # share of the mean variance; directions with far less variance are noise
# lower bound of the variance within labels, as a share of all variance; needed if labels have one cell each, or copies
_LEAST_WITHIN = 0.1


def start_heads(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    cells: Cells,
    objective: Label,
    *,
    device: str,
    random_state: int,
) -> None:
    """Fit the heads on frozen embeddings, each on the cells that have its label or value, in place.

    Parameters
    ----------
    model
        Model with new heads.
    source, match
        The cells, and the token of each of their genes.
    cells
        Training cells, what the heads predict, and the probability of drawing each cell.
    objective
        Loss of the heads.
    device
        Device on which embeddings are computed; the heads themselves are fitted on the CPU.
    random_state
        Seed for sampling cells.
    """
    rng = np.random.default_rng(random_state)
    rows, weights = cells.train, cells.weights
    columns = {spec.key: cells.targets[spec.key][rows] for spec in model.head_specs}
    labelled = {
        spec.key: np.isfinite(columns[spec.key]) if spec.classes is None else columns[spec.key] >= 0
        for spec in model.head_specs
    }
    chosen = np.unique(np.concatenate([_some(np.flatnonzero(known), rng) for known in labelled.values()]))
    parts = predict(
        model,
        source,
        match,
        lambda replica, batch: replica.head_inputs(batch),
        rows=rows[chosen],
        device=device,
        precision="fp32",
        desc="initialising the heads on",
    )
    states = torch.cat([values for _, values in parts])
    drawn = np.arange(len(chosen))
    if weights is not None:
        drawn = rng.choice(drawn, len(drawn), p=weights[chosen] / weights[chosen].sum())
    for spec in model.head_specs:
        column, known = torch.from_numpy(columns[spec.key][chosen]), labelled[spec.key][chosen]
        mean, whiten = whitening(states[known], _RIDGE, None if spec.classes is None else column[known])
        seen = drawn[known[drawn]]
        head = model.heads_on("cell")[spec.key]
        with torch.enable_grad():
            _fit(head, spec, (states[seen] - mean) @ whiten, column[seen], objective)
        with torch.no_grad():
            first = next(layer for layer in head.modules() if isinstance(layer, nn.Linear))
            first.weight.copy_(first.weight @ whiten.T)
            first.bias -= first.weight @ mean


def _some(cells: IntArray, rng: np.random.Generator) -> IntArray:
    return cells if len(cells) <= _MAX_CELLS else rng.choice(cells, _MAX_CELLS, replace=False)


def whitening(states: Tensor, ridge: float, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the mean ``(d,)`` and the whitening matrix ``(d, d)`` of states ``(n, d)``.

    Centred states times this matrix are uncorrelated and have variances near one. ``ridge`` times the mean variance is
    added to the variance of every direction. With ``labels`` (codes), the covariance within labels is whitened; the
    mean is that of all cells.
    """
    mean, spread = states.mean(0), states.var(0, correction=0).mean()
    of_label = [slice(None)] if labels is None else (labels == code for code in labels.unique())
    scatter = torch.zeros(2 * [states.shape[1]], dtype=torch.float64)
    for cells in of_label:
        centred = states[cells].double()
        centred -= centred.mean(0)
        scatter.addmm_(centred.T, centred)
    variance, directions = torch.linalg.eigh(scatter / len(states))
    variance = variance.clamp(min=0)
    # avoids a division by zero if all cells have the same state
    least = max(_LEAST_WITHIN * float(spread), 1e-12)
    scale = (variance + ridge * variance.mean().clamp(min=least)).rsqrt()
    return mean, ((directions * scale) @ directions.T).to(states.dtype)


def _fit(head: nn.Module, spec: HeadSpec, states: Tensor, target: Tensor, objective: Label) -> None:
    """Fit a head on all cells at once, to convergence: for linear heads, the result depends only on the data."""
    weights = list(head.parameters())
    matrices = [weight for weight in weights if weight.ndim > 1]
    optimise = torch.optim.LBFGS(
        weights, max_iter=_MAX_STEPS, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimise.zero_grad()
        loss = objective.of([spec], {spec.key: head(states)}, {f"label:{spec.key}": target})
        value = (loss.sum + _PENALTY / 2 * sum((w**2).sum() for w in matrices)) / loss.count.clamp(min=1)
        value.backward()
        return value

    head.eval()
    optimise.step(closure)
    log.debug(
        "initialised the head %r with a loss of %.4g on the training cells, including the penalty",
        spec.key,
        closure().item(),
    )
