"""What is trained: the specification of a run, and its cells."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scllm._typing import FloatArray, IntArray
from scllm.data.fingerprint import hash_arrays, same_matrix
from scllm.engine.config import Settings
from scllm.engine.lora import LoraSettings

__all__ = ["Cells", "DataSpec", "RunSpec", "check_same"]

# what may differ when a run is resumed
_FREE = ("versions", "processes", "data_reference", "data_stamp")
# training settings that may differ too, because the result does not depend on them
_FREE_SETTINGS = (
    "save_every", "keep_last", "log_every", "timeout", "max_restarts", "max_tokens", "compile", "checkpointing",
)  # fmt: skip
# training settings that may differ while the run has not finished
_CHANGEABLE_SETTINGS = ("lr", "clip", "precision")
# what the digests in a specification are digests of
_MEANING = {
    "data.fingerprint": " (the matrix and its genes)",
    "data.cells": " (the split, labels and weights of cells)",
    "data.tokens": " (the token of each gene)",
    "weights": " (the initial weights)",
}
# names of the columns of targets in the file of the cells
_TARGET = "target:"


@dataclass(frozen=True)
class Cells:
    """The cells of a run.

    Parameters
    ----------
    train, validation
        Rows of the source.
    targets
        What each head predicts, by its key: codes of labels (-1: missing) or values (NaN: missing) of all rows of the
        source, ``(n_obs,)``.
    weights
        Probability of drawing each training cell, up to a factor, ``(n_train,)``; ``None``: each is read once an epoch.
    inputs
        Row of the cell that the model reads for each row of the source, ``(n_obs,)``; ``None``: the cell itself.
    """

    train: IntArray
    validation: IntArray
    targets: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    weights: FloatArray | None = None
    inputs: IntArray | None = None

    def save(self, path: Path) -> None:
        """Write the arrays."""
        with path.open("wb") as handle:
            np.savez(handle, **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Cells:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            found = dict(arrays)
        targets = {name.removeprefix(_TARGET): found.pop(name) for name in list(found) if name.startswith(_TARGET)}
        return cls(targets=targets, **found)

    def hash(self) -> str:
        """Hash the split, labels and weights, because a run on others is a different run."""
        return hash_arrays(self._arrays())

    def _arrays(self) -> dict[str, NDArray[Any]]:
        targets = {_TARGET + key: column for key, column in self.targets.items()}
        weights = {} if self.weights is None else {"weights": self.weights}
        inputs = {} if self.inputs is None else {"inputs": self.inputs}
        return {"train": self.train, "validation": self.validation, **targets, **weights, **inputs}


@dataclass(frozen=True)
class DataSpec:
    """The data of a run.

    Parameters
    ----------
    fingerprint
        Digest of the matrix, see :func:`~scllm.data.fingerprint.fingerprint`.
    layer
        Layer that is read.
    cells
        Digest of the split, labels and weights.
    tokens
        Digest of the token of each gene.
    gene_key, min_coverage
        How gene names are matched to the vocabulary.
    """

    fingerprint: str
    layer: str | None
    cells: str
    tokens: str
    gene_key: str | None
    min_coverage: float


@dataclass(frozen=True)
class RunSpec:
    """All that decides the result of a run, and where its data are; stored as ``spec.json``.

    Parameters
    ----------
    verb
        The function that trains.
    family, model, weights, encoder, heads
        Model family, configuration, digest of the initial weights, encoder and heads.
    objective
        Training objective.
    train
        Training settings.
    freeze, lora
        Weights that are not trained, and adapters.
    params
        Other arguments of the function, for the record.
    data
        What the data are.
    data_reference, data_stamp
        Where the data are (``None``: in the directory), and the state of their files when they were hashed.
    processes
        Number of processes and device for which the directory was written.
    versions
        Versions of scllm and torch.
    """

    verb: str
    family: str
    model: Mapping[str, Any]
    weights: str
    encoder: Mapping[str, Any]
    heads: tuple[Mapping[str, Any], ...]
    objective: Mapping[str, Any]
    train: Settings
    freeze: Any
    lora: LoraSettings | None
    params: Mapping[str, str]
    data: DataSpec
    data_reference: str | list[str] | None
    data_stamp: str | None
    processes: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> RunSpec:
        """Read plain values; raise if this is not a specification of this version."""
        expected = {field.name for field in fields(cls)}
        if set(saved) != expected:
            raise ValueError(
                f"Expected a specification with the fields {sorted(expected)}, got {sorted(saved)}. Resume the run "
                "with the version of scllm that began it."
            )
        lora = saved["lora"] and LoraSettings(**saved["lora"])
        parts = {"train": Settings.from_dict(saved["train"]), "lora": lora, "data": DataSpec(**saved["data"])}
        return cls(**{**saved, **parts})

    def changed_settings(self, other: RunSpec) -> list[str]:
        """Name the settings that may change on resuming and do."""
        return [name for name in _CHANGEABLE_SETTINGS if getattr(self.train, name) != getattr(other.train, name)]

    def with_changes_of(self, other: RunSpec) -> RunSpec:
        """Return this with the settings of another that may change, and with where that one finds the data."""
        return replace(self, train=other.train, data_reference=other.data_reference, data_stamp=other.data_stamp)

    def check_resumes(self, before: RunSpec, path: Path, *, finished: bool) -> None:
        """Raise if this specification cannot resume the run in ``path`` that has another one."""
        settings = _FREE_SETTINGS if finished else _FREE_SETTINGS + _CHANGEABLE_SETTINGS
        free = {*_FREE, *(f"train.{name}" for name in settings)}
        check_same(before.to_json(), self.to_json(), path, free)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path, free: Collection[str] = ()) -> None:
    """Raise an error that names what differs between the plain values in a directory and others.

    Parameters
    ----------
    before, now
        What the directory holds, and what it is compared with.
    path
        The directory.
    free
        Names that may differ; those of nested values are joined by dots.
    """
    ours, theirs = (_flat({k: v for k, v in content.items() if k not in free}) for content in (before, now))
    pairs = {name: (ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs} - set(free))}
    different = [(name, *pair) for name, pair in pairs.items() if not _agree(name, *pair)]
    if different:
        seen = "; ".join(
            f"{name}{_MEANING.get(name, '')} was {_cut(one)}, now {_cut(other)}" for name, one, other in different[:6]
        )
        raise ValueError(
            f"Expected the settings of the run in '{path}', got others: {seen}. Pass the same data and settings to "
            "resume it, or another run_dir."
        )


def _agree(name: str, ours: Any, theirs: Any) -> bool:
    if name == "data.fingerprint" and ours and theirs:
        return same_matrix(ours, theirs)
    return ours == theirs


def _cut(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix.removesuffix("."): content}
    return {name: value for key, part in content.items() for name, value in _flat(part, f"{prefix}{key}.").items()}
