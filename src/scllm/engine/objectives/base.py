"""What objectives have in common: a loss with its count, and random numbers keyed by cell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from scllm.models.base import Batch, CellModel

__all__ = ["Loss", "Objective", "uniform"]


@dataclass
class Loss:
    """Loss of one micro-batch.

    Parameters
    ----------
    sum
        Loss summed over all predictions (hidden genes, labelled cells); used for the gradient.
    count
        Number of predictions. The loss of a step is the sum of all ``sum`` divided by the sum of all ``count``.
    logged
        Other sums, which are divided by the same count and written to the history.
    """

    sum: Tensor
    count: Tensor
    logged: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Training objective. Its random numbers depend only on ``batch.keys`` and the step."""

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """Compute the loss of a micro-batch."""
        ...

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Return the names of the logged sums, the same on ranks without cells."""
        ...

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """Compute the values for the history from the means of the logged sums."""
        ...


def uniform(keys: Tensor, entries: Tensor, salt: int = 0) -> Tensor:
    """Draw a uniform number in [0, 1) for each entry from (key, salt, entry), like ``kernels.draws`` but in torch."""
    return (_combine(_combine(keys, torch.full_like(keys, salt)), entries) >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _combine(state: Tensor, part: Tensor) -> Tensor:
    return _scramble(state ^ _scramble(part))


def _scramble(z: Tensor) -> Tensor:
    # splitmix64 on int64: products wrap around as with unsigned integers, shifts need the sign bits cleared
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
