"""What a model is trained for. An objective is called with model, batch and step, and gives a sum and a count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from scllm.engine.objectives.base import Loss, Objective
from scllm.engine.objectives.label import Label, LossName
from scllm.engine.objectives.masked_gene import MaskedGene
from scllm.engine.objectives.masked_value import MaskedValue

__all__ = [
    "Label",
    "Loss",
    "LossName",
    "MaskedGene",
    "MaskedValue",
    "Objective",
    "objective_from_dict",
    "objective_to_dict",
]


def objective_to_dict(objective: Objective) -> dict[str, Any]:
    """Plain settings of an objective."""
    return {"kind": type(objective).__name__, **asdict(objective)}  # type: ignore[call-overload]


def objective_from_dict(saved: Mapping[str, Any]) -> Objective:
    """The objective that :func:`objective_to_dict` described."""
    settings = dict(saved)
    kinds: dict[str, type] = {"MaskedGene": MaskedGene, "MaskedValue": MaskedValue, "Label": Label}
    kind = kinds[settings.pop("kind")]
    for name, value in settings.items():
        if isinstance(value, list):
            settings[name] = tuple(value)
    return kind(**settings)
