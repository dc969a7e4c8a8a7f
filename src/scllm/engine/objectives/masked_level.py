"""Masked expression levels, predicted as classes (scBERT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from scllm.engine.objectives.base import Loss, uniform
from scllm.engine.objectives.masks import drawn_share
from scllm.models.base import Batch, CellModel

__all__ = ["MaskedLevel"]

# independent random numbers for each purpose
HIDDEN, REPLACED = 0, 1


@dataclass(frozen=True)
class MaskedLevel:
    """Mask expression levels of expressed genes and classify them, with a cross-entropy over levels (scBERT).

    Parameters
    ----------
    mask_ratio
        Share of each cell's expressed genes to predict (one number in a tuple). Zeros are never predicted.
    replaced
        Share of these genes whose level is masked; the others keep their level.
    seed
        Part of the run's settings; random numbers are keyed by cell and epoch.
    """

    mask_ratio: tuple[float, ...] = (0.15,)
    replaced: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.mask_ratio) != 1 or not 0 < self.mask_ratio[0] < 1:
            raise ValueError(
                f"Expected mask_ratio to be one number between 0 and 1, got {self.mask_ratio}. scBERT uses 0.15."
            )
        if not 0 < self.replaced <= 1:
            raise ValueError(f"Expected replaced above 0 and at most 1, got {self.replaced}. scBERT uses 0.9.")

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum the cross-entropy over the tokens to predict."""
        assert batch.values is not None
        asked = drawn_share(batch, batch.values > 0, self.mask_ratio[0], HIDDEN, up=True)
        target = batch.values[asked].long()
        hidden = asked[uniform(batch.keys[batch.cell[asked]], batch.genes[asked], REPLACED) < self.replaced]
        shown = batch.with_values(batch.values.index_fill(0, hidden, model.hidden_level))
        logits = model.decode(model.hidden(shown)[asked])["level"].float()
        loss = F.cross_entropy(logits, target, reduction="sum")
        right = (logits.argmax(1) == target).sum()
        return Loss(loss, torch.tensor(len(asked), device=target.device), {"accuracy": right})

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log the accuracy of predicted levels."""
        return ("accuracy",)

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the logged means and the mask ratio."""
        return {**means, "mask_ratio": self.mask_ratio[0]}
