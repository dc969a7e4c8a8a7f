"""Losses as pure functions; most are sums, which can be added up over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "binary_cross_entropy",
    "contrastive",
    "cross_entropy",
    "dice",
    "elastic_similarity",
    "focal",
    "relative_error",
    "squared_error",
    "zero_likelihood",
]


def squared_error(predicted: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum squared errors; divided by their count, this is the masked MSE of scGPT."""
    return F.mse_loss(predicted.float(), target.float(), reduction="sum", weight=weight)


def relative_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum relative errors ``|p - t| / (t + 1e-6)``; targets of zero dominate the sum if there are any."""
    return ((predicted.float() - target).abs() / (target + 1e-6)).sum()


def zero_likelihood(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum the negative log-likelihood of whether genes are expressed, with probability ``sigmoid(logits)``."""
    return F.binary_cross_entropy_with_logits(logits.float(), (target > 0).float(), weight, reduction="sum")


def elastic_similarity(cell: Tensor, threshold: float) -> Tensor:
    """Compute scGPT's elastic cell similarity: mean ``1 - (cos - threshold)^2``, with negative cosines set to zero."""
    unit = F.normalize(cell.float(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(0).relu()
    return (1 - (cosine - threshold) ** 2).mean()


def contrastive(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Compute the mean cross-entropy of finding each cell's second view among all (CCE in scGPT; Gao et al. 2021)."""
    similarity = F.normalize(first.float(), dim=1) @ F.normalize(second.float(), dim=1).T / temperature
    return F.cross_entropy(similarity, torch.arange(len(first), device=first.device))


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each cell, ``(b,)``; label smoothing spreads a share of the target over classes."""
    logits = _exact(logits)
    weight = None if weight is None else weight.to(logits)
    return F.cross_entropy(logits, label, weight=weight, reduction="none", label_smoothing=label_smoothing)


def binary_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the one-versus-rest binary cross-entropy of each cell, summed over classes, ``(b,)``."""
    logits = _exact(logits)
    target = F.one_hot(label, logits.shape[1]).to(logits)
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1)
    return each if weight is None else each * weight[label]


def focal(logits: Tensor, label: Tensor, weight: Tensor | None = None, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss of each cell, cross-entropy times ``(1 - p)^gamma`` (Lin et al. 2017), ``(b,)``."""
    log_p = F.log_softmax(_exact(logits), dim=1).gather(1, label[:, None]).squeeze(1)
    each = -((1 - log_p.exp()) ** gamma) * log_p
    return each if weight is None else each * weight[label]


def dice(logits: Tensor, label: Tensor, weight: Tensor | None = None, smooth: float = 1.0) -> Tensor:
    """Compute the soft Dice loss of a batch: one minus the mean overlap of class and prediction.

    The mean is over the classes in the batch, weighted by ``weight`` (Milletari et al. 2016).
    """
    p = _exact(logits).softmax(1)
    target = F.one_hot(label, logits.shape[1]).to(p)
    overlap = (2 * (p * target).sum(0) + smooth) / (p.sum(0) + target.sum(0) + smooth)
    present = (target.sum(0) > 0).to(p)
    share = present if weight is None else present * weight
    return 1 - (overlap * share).sum() / share.sum().clamp(min=1e-12)


def _exact(logits: Tensor) -> Tensor:
    """Convert logits to float32 (float64 stays), because half precision is too coarse for logarithms."""
    return logits if logits.dtype == torch.float64 else logits.float()
