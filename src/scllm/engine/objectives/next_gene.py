"""Next gene prediction (GPT-2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scllm.engine.objectives.base import Loss
from scllm.models.base import Batch, CellModel

__all__ = ["NextGene"]


@dataclass(frozen=True)
class NextGene:
    """Predict each gene of a token sequence from the genes before it (Radford et al. 2019).

    The loss is the cross-entropy in nats per gene. The first token is not predicted, because nothing comes before it;
    if it is ``<cls>``, all genes are predicted.
    """

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum the cross-entropy in nats over the predicted genes."""
        if model.likelihood != "causal":
            raise ValueError(
                f"Expected a model with likelihood 'causal' for NextGene, got {model.likelihood!r} (family "
                f"{model.family!r}), which sees the genes that it predicts. Use the family's own objective."
            )
        predicted = ~model.is_special[batch.genes]
        predicted[batch.first[torch.tensor(batch.lengths, device=predicted.device) > 0]] = False
        at = predicted.nonzero().squeeze(1)
        return Loss(model.gene_loss(batch, at, batch.genes[at]), torch.tensor(len(at), device=at.device))

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log only the loss."""
        return ()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the means as they are."""
        return means
