"""Encoders, which turn the counts of a cell into the token sequence that a model reads. They are saved with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm._names import listed
from scllm.data.encode.base import Encoder
from scllm.data.encode.bins import BinEncoder
from scllm.data.encode.depth import DepthEncoder
from scllm.data.encode.levels import LevelEncoder
from scllm.data.encode.ranks import RankEncoder
from scllm.data.encode.values import ValueEncoder

__all__ = [
    "BinEncoder",
    "DepthEncoder",
    "Encoder",
    "LevelEncoder",
    "RankEncoder",
    "ValueEncoder",
    "encoder_from_dict",
    "encoder_to_dict",
]


def encoder_to_dict(encoder: Encoder) -> dict[str, Any]:
    """Convert an encoder to plain settings, with a hash of each of its arrays, so that different arrays differ."""
    settings = {"kind": type(encoder).__name__, **asdict(encoder)}  # type: ignore[call-overload]
    for name, array in encoder.arrays.items():
        settings[name] = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
    return settings


def encoder_from_dict(saved: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> Encoder:
    """Make the encoder that :func:`encoder_to_dict` described, with its arrays."""
    kinds = {kind.__name__: kind for kind in (BinEncoder, DepthEncoder, LevelEncoder, RankEncoder, ValueEncoder)}
    settings = {**saved, **(arrays or {})}
    kind = kinds.get(settings.pop("kind", ""))
    if isinstance(settings.get("medians"), str):
        raise ValueError(
            "Expected the gene medians that the encoder ranks by, but they are not among its arrays (extras.npz is "
            "missing or belongs to another model). Copy the whole model folder again."
        )
    if kind is None or set(settings) - {field.name for field in fields(kind)}:
        raise ValueError(
            f"Expected the settings of an encoder of kind {listed(sorted(kinds))}, got {dict(saved)}. "
            "The model was saved by another version of scllm: update scllm."
        )
    return kind(**settings)
