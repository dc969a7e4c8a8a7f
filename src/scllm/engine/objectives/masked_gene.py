"""Masked gene prediction (BERT, Geneformer, ALBERT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scllm.engine.objectives.base import Loss, uniform
from scllm.models.base import Batch, CellModel

__all__ = ["MaskedGene"]

# independent random numbers for each purpose
HIDDEN, HOW, WHICH = 7, 8, 9


@dataclass(frozen=True)
class MaskedGene:
    """Mask genes and predict them from all others (Devlin et al. 2019).

    Of the chosen genes, 80 % are replaced by ``<mask>``, 10 % by a random gene, and 10 % stay, so that states of genes
    that are not masked become useful too. Unlike in BERT, ``<cls>`` and ``<eos>`` are never chosen: their positions are
    known, and ``<cls>`` is needed to summarise the cell. Random numbers depend only on cell, epoch and position.

    Parameters
    ----------
    p
        Share of the genes that are chosen.
    seed
        Additional random seed.
    """

    p: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"Expected p between 0 and 1, got {self.p}. BERT uses 0.15.")

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum the cross-entropy in nats over the chosen genes."""
        if model.likelihood != "pseudo":
            raise ValueError(
                f"Expected a model with likelihood 'pseudo' for MaskedGene, got {model.likelihood!r} (family "
                f"{model.family!r}). Use the family's own objective."
            )
        shown, at = self.hide(batch, model.is_special, model.vocab.mask_id)
        return Loss(model.gene_loss(shown, at, batch.genes[at]), torch.tensor(len(at), device=at.device))

    def hide(self, batch: Batch, is_special: Tensor, mask_id: int) -> tuple[Batch, Tensor]:
        """Mask genes; return the masked batch and the positions to predict."""
        at = (~is_special[batch.genes] & (self._draw(batch, HIDDEN) < self.p)).nonzero().squeeze(1)
        how, which = self._draw(batch, HOW)[at], self._draw(batch, WHICH)[at]
        genes = (~is_special).nonzero().squeeze(1)
        other = genes[(which * len(genes)).long()]
        shown = torch.where(how < 0.8, mask_id, torch.where(how < 0.9, other, batch.genes[at]))
        return batch.with_genes(batch.genes.index_copy(0, at, shown)), at

    def _draw(self, batch: Batch, salt: int) -> Tensor:
        # keyed by position, not by gene: which positions are hidden must not depend on the genes there
        cell = batch.cell
        place = torch.arange(len(cell), device=cell.device) - batch.first[cell]
        return uniform(batch.keys[cell], place, 64 * self.seed + salt)

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log only the loss."""
        return ()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the loss and the share of masked genes."""
        return {**means, "mask_ratio": self.p}
