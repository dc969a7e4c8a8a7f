"""Training objectives. An objective is called with model, batch and step, and returns a sum and a count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from scllm._foreign import foreign_class, foreign_name
from scllm._names import listed
from scllm.engine.objectives.base import Loss, Objective
from scllm.engine.objectives.gene_label import GeneLabel
from scllm.engine.objectives.label import Label, LossName, loss_weights
from scllm.engine.objectives.masked_expression import MaskedExpression
from scllm.engine.objectives.masked_gene import MaskedGene
from scllm.engine.objectives.masked_level import MaskedLevel
from scllm.engine.objectives.masked_value import MaskedValue
from scllm.engine.objectives.next_gene import NextGene
from scllm.engine.objectives.permuted_gene import PermutedGene
from scllm.engine.objectives.perturbed_expression import PerturbedExpression, perturbed_flags

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
    "PerturbedExpression",
    "loss_weights",
    "objective_from_dict",
    "objective_to_dict",
    "perturbed_flags",
]

_ALL = (
    GeneLabel, Label, MaskedExpression, MaskedGene, MaskedLevel, MaskedValue, NextGene, PermutedGene,
    PerturbedExpression,
)  # fmt: skip
_KINDS: dict[str, type] = {kind.__name__: kind for kind in _ALL}


def objective_to_dict(objective: Objective) -> dict[str, Any]:
    """Return plain settings of an objective; the kind of one from another package is its full name."""
    kind = type(objective)
    name = kind.__name__ if _KINDS.get(kind.__name__) is kind else foreign_name(kind)
    return {"kind": name, **asdict(objective)}  # type: ignore[call-overload]


def objective_from_dict(saved: Mapping[str, Any], family: str | None = None) -> Objective:
    """Make the objective that :func:`objective_to_dict` described.

    An objective from the package of ``family``, which the caller must have passed, is imported.
    """
    settings = dict(saved)
    name = str(settings.pop("kind"))
    kind: type[Any] | None = foreign_class(name, family) if "." in name else _KINDS.get(name)
    if kind is None:
        raise ValueError(
            f"Expected an objective of kind {listed(sorted(_KINDS))}, got {name!r}. For one of your own package, write "
            "its full name, such as 'mylab.task.Task'."
        )
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
