"""Gradients averaged over ranks by torch's DistributedDataParallel, while the backward pass still runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scllm.engine import ranks
from scllm.engine.objectives import Loss, Objective
from scllm.engine.relational import Peers, relational_loss
from scllm.engine.sharding import is_sharded
from scllm.models.base import Batch, CellModel

__all__ = ["averaging", "loss_module"]


def loss_module(model: CellModel, objective: Objective) -> nn.Module:
    """Return a module that computes the loss of a micro-batch, and averages gradients if there are several ranks."""
    loss = _LossModule(model, objective)
    if ranks.world() == 1 or is_sharded(model):
        return loss
    # buffers are the same on all ranks, because they are functions of the step
    return DistributedDataParallel(loss, broadcast_buffers=False, gradient_as_bucket_view=True)


def averaging(loss: nn.Module, model: CellModel, *, now: bool) -> AbstractContextManager[None]:
    """Return a context in which the backward pass averages gradients over ranks, or only adds them up (not ``now``)."""
    if is_sharded(model):
        model.set_requires_gradient_sync(now)  # type: ignore[attr-defined, operator]
    if isinstance(loss, DistributedDataParallel) and not now:
        return loss.no_sync()
    return nullcontext()


class _LossModule(nn.Module):
    """The objective and the relational term as forward passes, because DistributedDataParallel wraps modules."""

    def __init__(self, model: CellModel, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, step: int | None, peers: Peers | None = None) -> Loss:
        """Compute the loss of a micro-batch in a step; without a step, the relational term of a view."""
        if step is None:
            loss = relational_loss(self.model, batch, peers)
        else:
            loss = self.objective(self.model, batch, step)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        return replace(loss, sum=_OfAllWeights.apply(loss.sum, *trained))


class _OfAllWeights(torch.autograd.Function):
    """Make a loss depend on all weights, with a gradient of zero for those that the step does not use.

    Ranks may have no cells, or none with a label, and every rank has to average the same gradients.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *weights: Tensor) -> Tensor:
        ctx.n_weights = len(weights)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # None is a gradient of zero that takes no memory
        return gradient, *[None] * ctx.n_weights
