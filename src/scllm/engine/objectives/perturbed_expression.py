"""Prediction of expression after a perturbation, from a control cell (scGPT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scllm.engine.objectives.base import Loss
from scllm.models.base import Batch, CellModel

__all__ = ["PerturbedExpression", "perturbed_flags"]

_CODE, _DOSE = "label:perturbation", "label:dose"


def perturbed_flags(batch: Batch, genes: Tensor, code: Tensor) -> Tensor:
    """Return 1 for tokens of perturbed genes and 0 for others, ``(t,)``.

    Parameters
    ----------
    batch
        The cells.
    genes
        Tokens of the genes of each perturbation, ``(n, k)``, -1 where there are fewer.
    code
        Perturbation of each cell, ``(b,)``; -1 for none.
    """
    of_cell = torch.where(code[:, None] >= 0, genes[code.clamp(min=0)], -1)
    return (of_cell[batch.cell] == batch.genes[:, None]).any(1).long()


def _is_flagged(batch: Batch, genes: Tensor, code: Tensor, flags: Tensor) -> Tensor:
    """Return the cells of which all perturbed genes are read, ``(b,)``; a random subset of genes may lack some."""
    asked = torch.where(code >= 0, (genes >= 0).sum(1)[code.clamp(min=0)], 0)
    return torch.bincount(batch.cell, weights=flags.double(), minlength=batch.n_cells) == asked


@dataclass(frozen=True)
class PerturbedExpression:
    """Predict the expression of a perturbed cell from a control cell and the flags of the perturbed genes.

    If cells are reduced to a random subset of their genes, those that lack a perturbed gene are left out of the step.
    Batches hold control cells, and the perturbed cells as their complete cells. ``batch.obs["label:perturbation"]``
    holds the code of the perturbation, -1 for control cells that are predicted from other control cells.

    Parameters
    ----------
    genes
        Tokens of the genes of each perturbation, by code; none for compounds.
    seed
        Seed of the choice of perturbations that each decoder of an ensemble is not trained on.
    """

    genes: Sequence[Sequence[int]]
    seed: int = 0

    predicts_whole_cells: ClassVar[bool] = True

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum squared errors over the genes that were read, averaged over the decoders that learn the perturbation."""
        assert batch.whole is not None
        code = batch.obs[_CODE].to(batch.genes.device)
        genes = self._genes(code.device)
        flags = perturbed_flags(batch, genes, code)
        predicted = model.predict_perturbed(batch, flags, self._covariate(model, batch, code))
        is_gene = ~model.is_special[batch.genes] & _is_flagged(batch, genes, code, flags)[batch.cell]
        cell, genes = batch.cell[is_gene], batch.genes[is_gene]
        error = (predicted[:, is_gene].float() - self._target(batch, len(model.vocab), cell, genes)) ** 2
        learns = self._learns(code, len(predicted)).to(error)[:, cell]
        each = (error * learns).sum(0) / learns.sum(0)
        total = each.sum()
        return Loss(total, torch.tensor(len(genes), device=genes.device), {"mse": total.detach()})

    def _genes(self, device: torch.device) -> Tensor:
        """Return the tokens of the genes of each perturbation, ``(n, k)``, -1 where there are fewer."""
        width = max(1, *(len(tokens) for tokens in self.genes), 1)
        return torch.tensor([[*tokens, *[-1] * (width - len(tokens))] for tokens in self.genes], device=device)

    def _covariate(self, model: CellModel, batch: Batch, code: Tensor) -> Tensor | None:
        """Return the vector of each cell's compound, with the logarithm of its dose as the last entry."""
        if not getattr(model.config, "n_covariates", 0):
            return None
        vector = model.covariates[code.clamp(min=0)].clone()
        vector[code < 0] = torch.nan
        if _DOSE in batch.obs:
            vector[:, -1] = torch.where(code < 0, torch.nan, torch.log1p(batch.obs[_DOSE].to(vector)))
        return vector

    def _target(self, batch: Batch, n_tokens: int, cell: Tensor, genes: Tensor) -> Tensor:
        """Look up the values of the perturbed cells; genes without a token are zero."""
        whole = batch.whole
        assert whole is not None
        assert whole.values is not None
        table = whole.values.new_zeros(batch.n_cells, n_tokens)
        table[whole.cell, whole.genes] = whole.values
        return table[cell, genes]

    def _learns(self, code: Tensor, n_decoders: int) -> Tensor:
        """Return which decoders learn each cell's perturbation, ``(n_decoders, b)``: all but one."""
        number = torch.arange(n_decoders, device=code.device)[:, None]
        left_out = (code + self.seed) % n_decoders == number
        return ~left_out | (code < 0) if n_decoders > 1 else torch.ones_like(left_out)

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log the mean squared error."""
        return ("mse",)

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the means as they are."""
        return means
