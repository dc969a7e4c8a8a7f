"""Prediction heads: what they answer and what they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scllm._typing import HeadReads

__all__ = ["HeadSpec", "Level", "Pooling"]

Level = Literal["cell", "gene"]
Pooling = Literal["cls", "mean", "ranked", "linear", "max", "all"]


@dataclass(frozen=True)
class HeadSpec:
    """What a prediction head answers.

    Parameters
    ----------
    key
        The ``obs`` column it was trained on, or the name of the genes' labels.
    classes
        Its labels in the order of the outputs; ``None`` for a head that predicts a value.
    mean, std
        Of the values a value head was trained on: its output times ``std`` plus ``mean`` is the value.
    pooling
        How the head, which is linear, reads a cell's states; ``None``: it is like the family's published heads.
    reads
        Which states those are: ``"inputs"`` of the first block, those after the ``"last"`` block, or ``"both"``.
    temperature
        What logits are divided by, so that probabilities are as often right as they say.
    level
        What it reads: the embedding of each cell, or the state of each gene token.
    """

    key: str
    classes: tuple[str, ...] | None
    mean: float = 0.0
    std: float = 1.0
    pooling: Pooling | None = None
    reads: HeadReads = "last"
    temperature: float = 1.0
    level: Level = "cell"

    @property
    def n_outputs(self) -> int:
        """Width of the head's output."""
        return 1 if self.classes is None else len(self.classes)
