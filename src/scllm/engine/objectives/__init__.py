"""Training objectives. An objective is called with model, batch and step, and returns a sum and a count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from scllm.engine.objectives.base import Loss, Objective
from scllm.engine.objectives.gene_label import GeneLabel
from scllm.engine.objectives.label import Label, LossName, loss_weights
from scllm.engine.objectives.masked_expression import MaskedExpression
from scllm.engine.objectives.masked_gene import MaskedGene
from scllm.engine.objectives.masked_level import MaskedLevel
from scllm.engine.objectives.masked_value import MaskedValue
from scllm.engine.objectives.next_gene import NextGene
from scllm.engine.objectives.permuted_gene import PermutedGene

__all__ = [
    "GeneLabel",
    "Label",
    "Loss",
    "LossName",
    "MaskedExpression",
    "MaskedGene",
    "MaskedLevel",
    "MaskedValue",
    "NextGene",
    "Objective",
    "PermutedGene",
    "loss_weights",
    "objective_from_dict",
    "objective_to_dict",
]

_ALL = (GeneLabel, Label, MaskedExpression, MaskedGene, MaskedLevel, MaskedValue, NextGene, PermutedGene)
_KINDS: dict[str, type] = {kind.__name__: kind for kind in _ALL}


def objective_to_dict(objective: Objective) -> dict[str, Any]:
    """Return plain settings of an objective."""
    return {"kind": type(objective).__name__, **asdict(objective)}  # type: ignore[call-overload]


def objective_from_dict(saved: Mapping[str, Any]) -> Objective:
    """Make the objective that :func:`objective_to_dict` described."""
    settings = dict(saved)
    kind: type[Any] = _KINDS[settings.pop("kind")]
    unknown = sorted(set(settings) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(
            f"Expected settings of the objective {kind.__name__} out of {[f.name for f in fields(kind)]}, got "
            f"{unknown[0]!r}. Leave it out."
        )
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = tuple(value)
    return kind(**settings)
