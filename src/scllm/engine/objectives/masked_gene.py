"""Hidden genes, predicted (BERT, Geneformer)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scllm.engine.objectives.base import Loss, uniform
from scllm.models.base import Batch, CellModel

__all__ = ["MaskedGene"]

# draws of one cell for different purposes are independent
_HIDDEN, _WHAT, _OTHER = 8, 9, 10


@dataclass(frozen=True)
class MaskedGene:
    """Hide genes of a rank sentence and predict which they are, as BERT is trained (Devlin et al. 2019).

    Of the chosen tokens eight in ten are hidden, one in ten is replaced by another gene of the vocabulary, and one in
    ten stays as it is. The loss is the cross-entropy in nats over the chosen tokens alone: no logits of others are
    computed. ``<cls>`` and ``<eos>`` are never chosen: where they stand is known, so predicting them teaches nothing,
    and ``<cls>`` has to be there to gather the cell. (The original may choose them.)

    Parameters
    ----------
    p
        Chance of each gene to be chosen.
    seed
        Not read: draws are keyed by the cells' own keys, which the run's seed and epoch are part of.
    """

    p: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p is {self.p}, a chance between 0 and 1 expected. BERT uses 0.15.")

    def hide(self, batch: Batch, is_special: Tensor, mask_id: int) -> tuple[Batch, Tensor]:
        """The batch as the model sees it, and the positions it is asked about."""
        keys = batch.keys[batch.cell]
        chosen = (uniform(keys, batch.genes, _HIDDEN) < self.p) & ~is_special[batch.genes]
        at = torch.nonzero(chosen).squeeze(1)
        keys, genes = keys[at], batch.genes[at]
        what = uniform(keys, genes, _WHAT)
        others = torch.nonzero(~is_special).squeeze(1)
        other = others[(uniform(keys, genes, _OTHER) * len(others)).long()]
        shown = torch.where(what < 0.8, mask_id, torch.where(what < 0.9, other, genes))
        return batch.with_genes(batch.genes.index_copy(0, at, shown)), at

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Cross-entropy summed over the chosen positions."""
        shown, at = self.hide(batch, model.is_special, model.vocab.mask_id)
        total = model.gene_loss(model.hidden(shown)[at], batch.genes[at])
        return Loss(total, torch.tensor(len(at), device=at.device))

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """The loss alone."""
        return ()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """The loss, the perplexity it stands for, and the share of genes asked about."""
        return {**means, "perplexity": math.exp(min(means["loss"], 700)), "mask_ratio": self.p}
