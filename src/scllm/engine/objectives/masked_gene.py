"""Hidden genes, predicted from the others (BERT, Geneformer, ALBERT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scllm.engine.objectives.base import Loss, uniform
from scllm.models.base import Batch, CellModel

__all__ = ["MaskedGene"]

# draws of one cell for different purposes are independent
HIDDEN, HOW, WHICH = 7, 8, 9


@dataclass(frozen=True)
class MaskedGene:
    """Hide genes and predict them from all others (Devlin et al. 2019).

    Of the chosen genes 80 % become ``<mask>``, 10 % another gene drawn at random, and 10 % stay, so that the states of
    genes that are shown are of use too. ``<cls>`` and ``<eos>`` are never chosen, unlike in BERT: where they stand is
    known, and ``<cls>`` has to be there to gather the cell. Draws are a function of the cell, the epoch and the place.

    Parameters
    ----------
    p
        Share of the genes that are chosen.
    seed
        What the draws are keyed by besides.
    """

    p: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p is {self.p}, a share between 0 and 1 expected. BERT uses 0.15.")

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Nats summed over the chosen genes."""
        if model.likelihood != "pseudo":
            raise ValueError(
                f"MaskedGene goes with models that see all genes around, the likelihood of this {model.family} model "
                f"is {model.likelihood!r}. Use the family's own objective."
            )
        shown, at = self.hide(batch, model.is_special, model.vocab.mask_id)
        return Loss(model.gene_loss(shown, at, batch.genes[at]), torch.tensor(len(at), device=at.device))

    def hide(self, batch: Batch, is_special: Tensor, mask_id: int) -> tuple[Batch, Tensor]:
        """The batch as the model sees it, and the positions it is asked about."""
        at = (~is_special[batch.genes] & (self._draw(batch, HIDDEN) < self.p)).nonzero().squeeze(1)
        how, which = self._draw(batch, HOW)[at], self._draw(batch, WHICH)[at]
        genes = (~is_special).nonzero().squeeze(1)
        other = genes[(which * len(genes)).long()]
        shown = torch.where(how < 0.8, mask_id, torch.where(how < 0.9, other, batch.genes[at]))
        return batch.with_genes(batch.genes.index_copy(0, at, shown)), at

    def _draw(self, batch: Batch, salt: int) -> Tensor:
        # by place, not by gene: which genes are hidden must say nothing of what they are
        cell = batch.cell
        place = torch.arange(len(cell), device=cell.device) - batch.first[cell]
        return uniform(batch.keys[cell], place, 64 * self.seed + salt)

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Nothing but the loss."""
        return ()

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """The loss, and the share of the genes asked about."""
        return {**means, "mask_ratio": self.p}
