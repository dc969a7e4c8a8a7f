"""What objectives have in common: a sum with its count, and draws that are a function of the cell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from scllm.models.base import Batch, CellModel

__all__ = ["Loss", "Objective", "uniform"]


@dataclass
class Loss:
    """What one micro-batch contributes.

    Parameters
    ----------
    sum
        Loss summed over what counts; gradients are taken of this.
    count
        How many counted: hidden genes, labelled cells. The loss of a step is all sums over all counts.
    logged
        Sums that are divided by the same count and written to the history.
    """

    sum: Tensor
    count: Tensor
    logged: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A training task. Draws are a function of ``batch.keys`` and the step."""

    def __call__(self, model: CellModel, batch: Batch, step: int) -> Loss:
        """The loss of a micro-batch."""
        ...

    def logs(self, model: CellModel) -> tuple[str, ...]:
        """Names of what is logged, the same on ranks that have no cells."""
        ...

    def report(self, means: dict[str, float], step: int) -> dict[str, float]:
        """What the history holds, from the means of what was logged."""
        ...


def uniform(keys: Tensor, entries: Tensor, salt: int = 0) -> Tensor:
    """One number in [0, 1) for each entry, a function of (key, salt, entry): what ``kernels.draws`` draws, in torch."""
    return (_combine(_combine(keys, torch.full_like(keys, salt)), entries) >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _combine(state: Tensor, part: Tensor) -> Tensor:
    return _scramble(state ^ _scramble(part))


def _scramble(z: Tensor) -> Tensor:
    # splitmix64 on int64: products wrap as they do unsigned, shifts need the sign bits cleared
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB)
    return z ^ (z >> 31 & (1 << 33) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
