"""The relational term of pretraining: similar cells get similar embeddings.

The cosine similarities between the embeddings of the cells of a step are regressed on those between principal
components of their whole log-normalised profiles (relational knowledge distillation, Park et al. 2019,
arXiv:1904.05068). What is embedded is a view of each cell: its counts are downsampled towards the depth of another
cell, and a random subset of its genes is read. Embeddings therefore have to agree across sequencing depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from scllm._typing import FloatArray
from scllm.engine import ranks
from scllm.engine.device import autocast
from scllm.engine.objectives import Loss
from scllm.models.base import Batch, CellModel

__all__ = ["COLUMN", "Peers", "constant_loss", "relational_loss", "without_noise"]

# column of a view with the principal components of the whole cell, scaled to unit length
COLUMN = "reference"


@dataclass(frozen=True)
class Peers:
    """All cells of a step, with which each of them is compared, so that micro-batches and ranks change nothing.

    Parameters
    ----------
    embeddings
        Embeddings of unit length, ``(n, d)``, without gradients.
    reference
        Principal components of unit length, ``(n, k)``.
    """

    embeddings: Tensor
    reference: Tensor

    @classmethod
    def gathered(cls, embeddings: Tensor, reference: Tensor) -> Self:
        """Gather the cells of all ranks, which must all call this."""
        return cls(ranks.gathered_rows(embeddings), ranks.gathered_rows(reference))

    @classmethod
    @torch.no_grad()
    def embedded(cls, model: CellModel, views: Sequence[Batch], precision: str) -> Self:
        """Embed views and gather them; all ranks must call this, with equally many views if weights are sharded."""
        with autocast(precision, model.device):
            embeddings = torch.cat([_embed(model, view) for view in views])
        return cls.gathered(embeddings, torch.cat([view.obs[COLUMN] for view in views]))


def relational_loss(model: CellModel, view: Batch, peers: Peers | None = None) -> Loss:
    """Sum the mean squared difference of similarities to all cells of the step over the cells of a view.

    Without ``peers``, the cells of the step are those of the views of all ranks, which then all call this once. The
    gradient of the mean over all pairs is twice that of this sum, because the other cell of a pair is a constant here.
    """
    own, reference = _embed(model, view), view.obs[COLUMN]
    if peers is None:
        peers = Peers.gathered(own.detach(), reference)
    difference = own @ peers.embeddings.T - reference @ peers.reference.T
    total = (difference**2).sum() / max(len(peers.embeddings), 1)
    return Loss(total, torch.tensor(view.n_cells, device=total.device))


@contextmanager
def without_noise(model: CellModel) -> Iterator[None]:
    """Switch off dropout for forward and backward passes of the relational term.

    Dropout makes embeddings of different cells unlike each other, which lowers the loss without any learning.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def constant_loss(reference: FloatArray) -> float:
    """Return the loss if the embeddings of all cells are the same, for cells with these principal components."""
    return float(np.mean((1 - reference @ reference.T) ** 2))


def _embed(model: CellModel, view: Batch) -> Tensor:
    """Return embeddings of unit length, ``(b, d)`` float32."""
    return normalize(model.embed(view).float(), dim=1)
