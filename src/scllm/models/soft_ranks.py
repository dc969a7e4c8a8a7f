"""SoftSort: a relaxed order of values that has gradients (Prillo and Eisenschlos, *ICML* 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hard_ranks", "ranked", "soft_ranks"]


def soft_ranks(values: Tensor, k: int, tau: float) -> Tensor:
    """Return the probability that each value has each of the ``k`` highest ranks, ``(b, g)`` to ``(b, k, g)``.

    Row ``i`` is the softmax of ``-|v - v_i| / tau``, where ``v_i`` is the ``i``-th highest value. As ``tau`` goes to 0,
    it becomes the indicator of that value.
    """
    highest = values.sort(dim=1, descending=True, stable=True).values[:, :k]
    return torch.softmax(-(highest[:, :, None] - values[:, None, :]).abs() / tau, dim=2)


def hard_ranks(values: Tensor, k: int) -> Tensor:
    """Return which value has each of the ``k`` highest ranks, as 0 and 1; ties are in the order of columns."""
    at = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(*at.shape, values.shape[1], dtype=values.dtype, device=values.device).scatter_(
        2, at[..., None], 1
    )


def ranked(values: Tensor, k: int, tau: float, *, n_read: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exact ranks with the gradients of relaxed ones, ``(b, k, g)``, and which of them are read, ``(b, k)``.

    Of each row the ``n_read`` highest values are read, ``(b,)``, or ``k`` if that is fewer.
    """
    hard = hard_ranks(values.detach(), k)
    read = torch.arange(hard.shape[1], device=values.device) < n_read[:, None]
    if not values.requires_grad:
        return hard, read
    soft = soft_ranks(values, k, tau)
    # the difference is exactly zero, so the result is exactly the hard one
    return hard + (soft - soft.detach()), read
