"""Prediction of gene labels from the hidden states of gene tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scllm.engine import losses
from scllm.engine.objectives.base import Loss
from scllm.engine.objectives.label import LossName, check_loss
from scllm.models.base import Batch, CellModel

__all__ = ["GeneLabel", "weighted_loss"]


@dataclass(frozen=True)
class GeneLabel:
    """Predict labels of genes from the hidden states of their tokens in each cell.

    Only expressed genes are used, and tokens of all other genes have no label.

    Parameters
    ----------
    genes
        Token ids of the training genes of each class, in the order of the head's outputs.
    weights
        Weight of each token of these genes, in the same order; higher for rare classes and rarely expressed genes.
    held_out
        Token ids of validation genes of each class, which are labelled only in evaluation.
    held_out_weights
        Weight of each token of the validation genes.
    loss
        Weight of each loss: ``"ce"``, ``"bce"``, ``"dice"``, ``"focal"``.
    """

    genes: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]]
    held_out: Sequence[Sequence[int]] = ()
    held_out_weights: Sequence[Sequence[float]] = ()
    loss: Mapping[LossName, float] = field(default_factory=lambda: {"bce": 1.0})

    def __post_init__(self) -> None:
        check_loss(self.loss)

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Sum the weighted loss over labelled tokens."""
        key = next(iter(model.heads_on("gene")))
        label, weight = self._tables(len(model.vocab), batch.genes.device, model.training)
        token_label = label[batch.genes]
        labelled = (token_label >= 0) & model.is_expressed(batch)
        target, factor = token_label[labelled], weight[batch.genes[labelled]]
        predicted = model.gene_head_outputs(batch)[key][labelled]
        right = (predicted.argmax(1) == target) * factor if len(target) else factor
        return Loss(weighted_loss(predicted, target, factor, self.loss), factor.sum(), {"accuracy": right.sum()})

    def _tables(self, n_tokens: int, device: torch.device, training: bool) -> tuple[Tensor, Tensor]:
        """Return the label (-1: none) and weight of every token of the vocabulary."""
        genes, weights = (self.genes, self.weights) if training else (self.held_out, self.held_out_weights)
        label, weight = torch.full((n_tokens,), -1), torch.zeros(n_tokens)
        for code, (ids, factors) in enumerate(zip(genes, weights, strict=True)):
            label[list(ids)] = code
            weight[list(ids)] = torch.tensor(list(factors))
        return label.to(device), weight.to(device)

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Log the weighted accuracy of labelled tokens."""
        return ("accuracy",)

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Report the means as they are."""
        return means


def weighted_loss(logits: Tensor, label: Tensor, weight: Tensor, loss: Mapping[LossName, float]) -> Tensor:
    """Sum weight times loss over rows ``(n, k)``; ``loss`` gives a weight for each loss by name."""
    total = torch.zeros((), device=logits.device)
    if not len(label):
        return total + 0 * logits.sum()
    for name, factor in loss.items():
        match name:
            case "ce":
                each = (losses.cross_entropy(logits, label) * weight).sum()
            case "bce":
                each = (losses.binary_cross_entropy(logits, label) * weight).sum()
            case "focal":
                each = (losses.focal(logits, label) * weight).sum()
            case "dice":
                # gives all classes the same weight by itself; does not add up over micro-batches
                each = losses.dice(logits, label) * weight.sum()
        total = total + factor * each
    return total
