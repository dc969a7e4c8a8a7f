"""Find the model that a verb uses: the one passed, or the one last recorded on the AnnData."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from anndata import AnnData

from scllm import _keys, models
from scllm._results import match_settings
from scllm.data import genes
from scllm.data.cells import CellSource
from scllm.data.matching import match_source
from scllm.models.base import CellModel

__all__ = ["ModelLike", "copy_to_train", "gene_match", "recorded_model", "remember", "resolve"]

ModelLike = CellModel | str | PathLike[str]

# Models that were never saved, by hash. An entry disappears when nothing refers to the model any more.
_unsaved: WeakValueDictionary[str, CellModel] = WeakValueDictionary()
# The unsaved model recorded on each AnnData, by the id of the AnnData. This keeps the model alive.
_held: dict[int, CellModel] = {}


def resolve(model: ModelLike | None, adata: AnnData | None) -> CellModel:
    """Return the model that was passed, load it from a path or the Hub, or find the one recorded on ``adata``."""
    if isinstance(model, CellModel):
        return model
    if model is None:
        return recorded_model(adata)
    if not isinstance(model, (str, PathLike)):
        raise TypeError(
            f"Expected model to be a model or its path, got an object of type {type(model).__name__}. Pass the data "
            "first and then the model: verb(adata, model)."
        )
    return models.load(model)


def copy_to_train(model: CellModel) -> CellModel:
    """Copy a model to the CPU, without what will not be that of the model it becomes, such as its history and path."""
    copied = copy.deepcopy(model).cpu()
    copied.history, copied.comparison, copied.path = None, None, None
    copied.known_cells = {}
    return copied


def recorded_model(adata: AnnData | None) -> CellModel:
    """Return the model last recorded on ``adata``."""
    entry = {} if adata is None else adata.uns.get(_keys.UNS, {}).get("model", {})
    if not entry:
        raise ValueError(
            "Expected a model, but none was passed and adata.uns['scllm']['model'] records none. Pass a model or its "
            "path."
        )
    path = str(entry.get("path", ""))
    if not path:
        return _unsaved_model(adata, entry["hash"])
    if not Path(path).exists():
        raise FileNotFoundError(
            f"Expected the model recorded in adata.uns['scllm']['model'] at {path}, but it does not exist. Pass a "
            "model or its new path."
        )
    found = models.load(path, family=None if models.storage.is_native(Path(path)) else _known_family(entry))
    if found.hash() != entry["hash"]:
        raise ValueError(
            f"Expected the model that adata.uns['scllm']['model'] records (hash {entry['hash']}) in {path}, got "
            f"another one (hash {found.hash()}). Pass the model to use."
        )
    return found


def _unsaved_model(adata: AnnData | None, hash: str) -> CellModel:
    found = _unsaved.get(hash)
    if found is None:
        raise ValueError(
            f"The model recorded in adata.uns['scllm']['model'] (hash {hash}) was never saved. Such a model is kept "
            "only in the Python process that made it, and only while a variable or the AnnData it was used on holds "
            "it. Pass a model, and save models with model.save(path)."
        )
    if adata is not None:
        _hold(adata, found)  # A copy of an AnnData may outlive the original, which kept the model alive.
    return found


def _hold(adata: AnnData, model: CellModel | None) -> None:
    """Keep a model alive as long as this AnnData, and release the model that it held before."""
    if id(adata) not in _held and model is not None:
        weakref.finalize(adata, _held.pop, id(adata), None)
    if model is None:
        _held.pop(id(adata), None)
    else:
        _held[id(adata)] = model


def _known_family(entry: Mapping[str, Any]) -> str:
    """Return the recorded family; raise if it is from another package, because no file may cause an import."""
    family = str(entry["family"])
    if family not in models.families():
        raise ValueError(
            f"Expected the family of the model recorded in adata.uns['scllm']['model'] to be one of "
            f"{models.families()}, got {family!r}. Load a model of another package with models.load(path, family=...) "
            "and pass it."
        )
    return family


def remember(adata: AnnData | CellSource, model: CellModel) -> None:
    """Record the model on ``adata`` so that later verbs find it."""
    if not isinstance(adata, AnnData):
        return
    entry = {"family": model.family, "hash": model.hash()}
    _hold(adata, model if model.path is None else None)
    if model.path is None:
        _unsaved[entry["hash"]] = model
    else:
        entry["path"] = str(model.path)
    adata.uns[_keys.UNS] = {**adata.uns.get(_keys.UNS, {}), "model": entry}


def gene_match(
    data: object,
    source: CellSource,
    model: CellModel,
    gene_key: str | None = None,
    min_coverage: float | None = None,
) -> genes.GeneMatch:
    """Match the genes of the data to tokens of the model's vocabulary."""
    return match_source(source, model.vocab, **match_settings(data, gene_key, min_coverage))
