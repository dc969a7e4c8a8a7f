"""Starting fresh heads from the data: trained alone on the states that the model gives the training cells, in seconds.

A head that knows nothing pulls the model's states about before it has learnt anything (Kumar et al., "Fine-tuning can
distort pretrained features and underperform out-of-distribution", *ICLR* 2022, arXiv:2202.10054). States of cells lie
close together and vary along few directions, and what tells related types apart is not among those: heads learn from
whitened states, and their first linear layer takes the whitening over at the end. A linear head is then the logistic
regression of the states. What is whitened is the variance within labels, as in linear discriminant analysis: that
between them is what the head shall read, while cells of one label differ in depth, donor and batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scllm._log import log
from scllm._typing import FloatArray, IntArray
from scllm.data.genes import GeneMatch
from scllm.data.source import CellSource
from scllm.engine.objectives import Label
from scllm.engine.predict import predict
from scllm.models.base import CellModel, HeadSpec

__all__ = ["start_heads", "whitening"]

_MAX_CELLS = 100_000  # of a head: more do not change where a head of this size starts
_MAX_STEPS = 300
# Half of it times the squared weights is added to the summed loss, as C = 0.1 of a logistic regression; how it and the
# ridge were chosen stands in docs/study.md
_PENALTY = 10.0
_RIDGE = 0.3  # of the mean variance: directions far below it are noise
# of all variance, taken for that within labels where cells of a label hardly differ: one cell of each, or copies of one
_LEAST_WITHIN = 0.1


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
    """Train the heads alone, each on the cells that have its label or value, in place.

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
    columns = {spec.key: targets[f"label:{spec.key}"][rows] for spec in model.head_specs}
    there = {
        spec.key: np.isfinite(columns[spec.key]) if spec.classes is None else columns[spec.key] >= 0
        for spec in model.head_specs
    }
    chosen = np.unique(np.concatenate([_some(np.flatnonzero(known), rng) for known in there.values()]))
    parts = predict(
        model, source, match, lambda replica, batch: replica.head_inputs(batch), rows=rows[chosen], device=device,
        precision="fp32", desc="initialising the heads on",
    )  # fmt: skip
    states = torch.cat([values for _, values in parts])
    drawn = np.arange(len(chosen))
    if weights is not None:
        drawn = rng.choice(drawn, len(drawn), p=weights[chosen] / weights[chosen].sum())
    for spec in model.head_specs:
        column, known = torch.from_numpy(columns[spec.key][chosen]), there[spec.key][chosen]
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
    """Mean ``(d,)``, and the matrix ``(d, d)`` by which centred states get variances near one and no correlations.

    ``ridge`` times the mean variance is added to that of every direction. With ``labels`` (codes) variances and
    correlations are those within labels; the mean is of all cells.
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
    # states that are the same in all cells say nothing
    least = max(_LEAST_WITHIN * float(spread), 1e-12)
    scale = (variance + ridge * variance.mean().clamp(min=least)).rsqrt()
    return mean, ((directions * scale) @ directions.T).to(states.dtype)


def _fit(head: nn.Module, spec: HeadSpec, states: Tensor, target: Tensor, objective: Label) -> None:
    """All cells at once, to the end: a function of the data alone where heads are linear."""
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
        "the head %r starts at a loss of %.4g on the training cells, its penalty included", spec.key, closure().item()
    )
