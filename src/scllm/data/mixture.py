"""Mixture weights: which groups of cells (tissues, data sets) are drawn more or less often in training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd

from scllm._checks import missing_key
from scllm._names import listed
from scllm._typing import FloatArray

__all__ = ["cell_weights", "check_group_weights"]

_EXAMPLE = "Pass for example {'key': 'tissue', 'temperature': 0.5}."


def check_group_weights(given: object) -> dict[str, Any]:
    """Return ``group_weights`` as plain values; raise if it is not ``key`` with ``temperature`` or ``weights``."""
    named = set(given) if isinstance(given, Mapping) else set()
    if not isinstance(given, Mapping) or named not in ({"key", "temperature"}, {"key", "weights"}):
        raise ValueError(
            f"Expected group_weights to be a mapping of 'key' and either 'temperature' or 'weights', got {given!r}. "
            f"{_EXAMPLE}"
        )
    if not isinstance(given["key"], str):
        raise TypeError(f"Expected group_weights['key'] to be a column of obs, got {given['key']!r}. {_EXAMPLE}")
    if "temperature" in given:
        temperature = given["temperature"]
        if not _is_number(temperature) or not 0 <= temperature <= 1:
            raise ValueError(
                f"Expected group_weights['temperature'] to be a number from 0 to 1, got {temperature!r}. Pass 0 to "
                "draw all groups equally often, or 1 to draw all cells equally often."
            )
        return {"key": given["key"], "temperature": float(temperature)}
    weights = given["weights"]
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(
            f"Expected group_weights['weights'] to be a mapping of groups to numbers, got {weights!r}. Pass for "
            "example {'key': 'tissue', 'weights': {'blood': 2, 'lung': 1}}."
        )
    for group, weight in weights.items():
        if not _is_number(weight) or not 0 <= weight < math.inf:
            raise ValueError(
                f"Expected the weight of group {group!r} in group_weights to be a number of at least 0, got "
                f"{weight!r}. Pass 0 to leave the group out."
            )
    return {"key": given["key"], "weights": {str(group): float(weight) for group, weight in weights.items()}}


def cell_weights(group_weights: Mapping[str, Any], groups: pd.Series, training: pd.Series) -> FloatArray:
    """Compute the probability of drawing each training cell, up to a factor.

    Parameters
    ----------
    group_weights
        What :func:`check_group_weights` returns.
    groups
        Group of every cell, to tell groups without training cells from groups that do not exist.
    training
        Group of each training cell, without missing values.

    Returns
    -------
    float32 weights ``(n_training_cells,)``; the weights of the cells of a group add up to the weight of the group.
    """
    codes, names = pd.factorize(training.astype(str), sort=True)
    counts = np.bincount(codes, minlength=len(names))
    if "temperature" in group_weights:
        shares = np.array([math.pow(n, group_weights["temperature"]) for n in counts])
    else:
        shares = _given_shares(group_weights, set(groups.dropna().astype(str)), list(names))
    # rounded, so that a run has the same weights on every machine
    return (shares / shares.sum() / counts).astype(np.float32)[codes]


def _given_shares(group_weights: Mapping[str, Any], known: set[str], names: list[str]) -> FloatArray:
    """Return the weight of each of the named groups."""
    weights, where = group_weights["weights"], f"obs[{group_weights['key']!r}]"
    unknown = sorted(set(weights) - known)
    if unknown:
        raise missing_key(unknown[0], sorted(known), f"a group of {where}", "Correct group_weights.")
    lacking = [name for name in names if name not in weights]
    if lacking:
        raise ValueError(
            f"Expected group_weights to name all groups of {where} that training cells have, but it lacks "
            f"{listed(lacking)}. Add them, with weight 0 to leave them out."
        )
    shares = np.array([weights[name] for name in names])
    if not shares.any():
        raise ValueError(
            f"Expected a group of {where} with a weight above 0 in group_weights, got 0 for all {len(names)} groups "
            "that training cells have. Raise one of them."
        )
    return shares


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
