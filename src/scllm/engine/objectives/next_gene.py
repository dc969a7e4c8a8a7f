"""Each gene from those before it (GPT-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scllm.engine.objectives.base import Loss
from scllm.models.base import Batch, CellModel

__all__ = ["NextGene"]


@dataclass(frozen=True)
class NextGene:
    """Predict each gene of a sentence from the genes before it (Radford et al. 2019).

    The loss is the cross-entropy in nats per gene. A sentence's first token has nothing before it and is not
    predicted; with ``<cls>`` first, all genes are.
    """

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Nats summed over the predicted genes."""
        if model.likelihood != "causal":
            raise ValueError(
                f"NextGene goes with models that look back only, the likelihood of this {model.family} model is "
                f"{model.likelihood!r}: it would copy what it is to predict. Use the family's own objective."
            )
        predicted = ~model.is_special[batch.genes]
        predicted[batch.first[torch.tensor(batch.lengths, device=predicted.device) > 0]] = False
        at = predicted.nonzero().squeeze(1)
        return Loss(model.gene_loss(batch, at, batch.genes[at]), torch.tensor(len(at), device=at.device))

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Nothing but the loss."""
        return ()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """As logged."""
        return means
