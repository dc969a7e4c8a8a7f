"""Decide from which probability or distance on a cell is of no known type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scllm._log import warn
from scllm._typing import FloatArray
from scllm.models.base import CellModel, HeadSpec

__all__ = ["FPR", "Cutoff", "Unknown", "check_unknown", "cutoff_at", "cutoffs"]

Unknown: TypeAlias = Literal["probability", "distance"]

FPR = 0.05
"""Default share of cells of known types that are called unknown."""


@dataclass(frozen=True)
class Cutoff:
    """Cells with a lower probability, or with a larger distance, than ``value`` are of no known type."""

    score: Unknown
    value: float

    def is_unknown(self, scores: FloatArray) -> NDArray[np.bool_]:
        """Return which cells are of no known type."""
        return scores < self.value if self.score == "probability" else scores > self.value


def check_unknown(unknown: str | None, threshold: float | None, fpr: float | None, known: Sequence[Unknown]) -> None:
    """Raise unless the arguments of a verb that say which cells are unknown are valid, and go together."""
    if unknown is not None and unknown not in known:
        raise ValueError(f"Expected unknown to be one of {tuple(known)} or None, got {unknown!r}. Pass one of these.")
    if fpr is not None and unknown is None:
        raise TypeError(
            f"fpr={fpr!r} needs unknown=, which says how unknown cells are found. Pass unknown='distance', or leave "
            "fpr out."
        )
    if fpr is not None and threshold is not None:
        raise TypeError(f"Expected threshold or fpr, got both: {threshold!r} and {fpr!r}. Leave one out.")
    if fpr is not None and not (isinstance(fpr, Real) and 0 < fpr < 1):
        raise ValueError(f"Expected fpr to be a rate between 0 and 1, got {fpr!r}. Leave it out for {FPR}.")
    if threshold is None:
        return
    is_number = isinstance(threshold, Real) and not isinstance(threshold, bool) and threshold >= 0
    if unknown == "distance" and not (is_number and math.isfinite(threshold)):
        raise ValueError(
            f"Expected threshold to be a distance of at least 0, got {threshold!r}. Pass fpr= to have it chosen."
        )
    if unknown != "distance" and not (is_number and threshold <= 1):
        raise ValueError(
            f"Expected threshold to be a probability from 0 to 1, got {threshold!r}. Leave it out to label every cell."
        )


def cutoffs(
    model: CellModel,
    specs: Sequence[HeadSpec],
    unknown: Unknown | None,
    threshold: float | None,
    fpr: float | None,
) -> dict[str, Cutoff]:
    """Return the cutoff of each head on labels, by key; empty if no cell is to be unknown."""
    check_unknown(unknown, threshold, fpr, ("probability", "distance"))
    if unknown is None and threshold is None:
        return {}
    score: Unknown = unknown or "probability"
    labelled = [spec for spec in specs if spec.classes is not None]
    if not labelled:
        given = f"threshold={threshold}" if unknown is None else f"unknown={unknown!r}"
        raise TypeError(
            f"Expected a head that predicts labels with {given}, got the head on {specs[0].key!r}, which predicts "
            "values. Leave it out."
        )
    return {spec.key: _cutoff(model, spec.key, score, threshold, FPR if fpr is None else fpr) for spec in labelled}


def _cutoff(model: CellModel, key: str, score: Unknown, threshold: float | None, fpr: float) -> Cutoff:
    kept = model.known_cells.get(key)
    if kept is None and (score == "distance" or threshold is None):
        path = f" in {model.path}" if model.path is not None else ""
        raise ValueError(
            f"Expected a model that keeps its training cells, but the {model.family} model{path} keeps none for the "
            f"head on {key!r}: it was fine-tuned by an earlier version, or comes from a published checkpoint. "
            "Fine-tune it again (tl.finetune), or pass threshold= alone."
        )
    if threshold is not None:
        return Cutoff(score, float(threshold))
    assert kept is not None
    if not len(kept.probability):
        raise ValueError(
            f"Expected validation cells, on which fpr={fpr} is measured, but the head on {key!r} was fine-tuned "
            "without labelled ones. Fine-tune with validation=, or pass threshold=."
        )
    if score == "probability":
        return Cutoff(score, -cutoff_at(-kept.probability, fpr))
    return Cutoff(score, cutoff_at(kept.distance, fpr))


def cutoff_at(strangeness: FloatArray, fpr: float) -> float:
    """Return the value that new cells like ``n`` known ones exceed with a probability of at most ``fpr``.

    It is the ``ceil((n + 1) (1 - fpr))``-th smallest value (split conformal prediction, Papadopoulos et al., ECML 2002,
    doi:10.1007/3-540-36755-1_29).
    """
    n = len(strangeness)
    place = math.ceil((n + 1) * (1 - fpr) - 1e-9)
    if place > n:
        warn(
            f"With {n} known cells to choose it on, no threshold is sure to call at most {fpr:.3g} of the cells of "
            "known types unknown. The most extreme known cell is taken. Pass a larger fpr=, or more such cells."
        )
    return float(np.sort(strangeness)[min(place, n) - 1])
