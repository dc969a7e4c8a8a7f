"""Encoders, which turn the counts of a cell into the token sequence that a model reads. They are saved with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm._foreign import foreign_class, foreign_name
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


_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (BinEncoder, DepthEncoder, LevelEncoder, RankEncoder, ValueEncoder)
}


def encoder_to_dict(encoder: Encoder) -> dict[str, Any]:
    """Convert an encoder to plain settings, with a hash of each of its arrays, so that different arrays differ.

    The kind of an encoder from another package is its full name.
    """
    kind = type(encoder)
    name = kind.__name__ if _KINDS.get(kind.__name__) is kind else foreign_name(kind)
    settings = {"kind": name, **asdict(encoder)}  # type: ignore[call-overload]
    for name, array in encoder.arrays.items():
        settings[name] = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
    return settings


def encoder_from_dict(
    saved: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None, family: str | None = None
) -> Encoder:
    """Make the encoder that :func:`encoder_to_dict` described, with its arrays.

    An encoder from the package of ``family``, which the caller must have passed, is imported.
    """
    settings = {**saved, **(arrays or {})}
    name = str(settings.pop("kind", ""))
    kind = foreign_class(name, family) if "." in name else _KINDS.get(name)
    if isinstance(settings.get("medians"), str):
        raise ValueError(
            "Expected the gene medians that the encoder ranks by, but they are not among its arrays (extras.npz is "
            "missing or belongs to another model). Copy the whole model folder again."
        )
    if kind is None or set(settings) - {field.name for field in fields(kind)}:
        raise ValueError(
            f"Expected the settings of an encoder of kind {listed(sorted(_KINDS))}, got {dict(saved)}. "
            "The model was saved by another version of scllm: update scllm."
        )
    return kind(**settings)
