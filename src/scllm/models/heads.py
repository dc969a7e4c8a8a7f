"""Description of prediction heads: what they predict and what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from scllm._labels import Categories
from scllm._typing import HeadReads

__all__ = ["HeadSpec", "Level", "Pooling"]

Level = Literal["cell", "gene"]
Pooling: TypeAlias = str
"""How hidden states of a cell become one vector; a family lists what it knows in ``CellModel.poolings``."""


@dataclass(frozen=True)
class HeadSpec:
    """Description of a prediction head.

    Parameters
    ----------
    key
        Column of ``obs`` that it was trained on, or the name of the genes' labels.
    classes
        Its labels in the order of the outputs; ``None`` for a head that predicts a value.
    mean, std
        Mean and standard deviation of the training values: the predicted value is the output times ``std`` plus
        ``mean``.
    pooling
        How hidden states are pooled for the head, which is linear. ``None``: it is like the family's published heads.
    reads
        Which states are pooled: ``"inputs"`` of the first block, those after the ``"last"`` block, or ``"both"``.
    temperature
        Divisor of the logits that calibrates the probabilities.
    level
        Whether it reads the embedding of each cell, or the hidden state of each gene token.
    categories
        How the column that it was trained on stored its labels; ``None``: as strings, the classes alone.
    """

    key: str
    classes: tuple[str, ...] | None
    mean: float = 0.0
    std: float = 1.0
    pooling: Pooling | None = None
    reads: HeadReads = "last"
    temperature: float = 1.0
    level: Level = "cell"
    categories: Categories | None = None

    @property
    def n_outputs(self) -> int:
        """Number of outputs."""
        return 1 if self.classes is None else len(self.classes)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> HeadSpec:
        """As ``dataclasses.asdict`` gave it, perhaps by way of JSON."""
        classes, categories = content["classes"], content.get("categories")
        return cls(
            **{
                **content,
                "classes": None if classes is None else tuple(classes),
                "categories": None if categories is None else Categories.from_dict(categories),
            }
        )
