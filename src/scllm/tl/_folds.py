"""Split cells into folds, stratified by label or by whole groups, and keep the predictions of finished folds."""

from __future__ import annotations

import json
import secrets
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

from scllm import settings
from scllm._typing import FloatArray, IntArray
from scllm.data.run_files import read_json, write_json
from scllm.engine.run import Run
from scllm.engine.spec import check_same
from scllm.tl._train import check_resume

__all__ = ["fold_cells", "folds_directory", "keep_predictions", "kept_predictions"]


def fold_cells(
    n_cells: int,
    n_folds: int,
    *,
    codes: IntArray | None = None,
    groups: IntArray | None = None,
    random_state: int = 0,
) -> IntArray:
    """Assign each cell to the fold that tests it, ``(n_cells,)``; no fold is empty.

    Parameters
    ----------
    n_cells
        Number of cells.
    n_folds
        Number of folds; with as many folds as groups, each fold leaves one group out.
    codes
        Label of each cell: every fold gets the same share of each label, as far as whole groups allow.
    groups
        Group of each cell: 0, 1, ...; groups are never split.
    random_state
        Random seed.
    """
    if groups is not None and groups.max() + 1 == n_folds:
        return groups.copy()
    labels = np.zeros(n_cells) if codes is None else codes
    options = {"n_splits": n_folds, "shuffle": True, "random_state": random_state}
    if groups is None:
        splitter = KFold(**options) if codes is None else StratifiedKFold(**options)
    else:
        splitter = GroupKFold(**options) if codes is None else StratifiedGroupKFold(**options)
    fold = np.empty(n_cells, np.int64)
    with warnings.catch_warnings():
        # The verb has already warned of rare labels.
        warnings.filterwarnings("ignore", message="The least populated class")
        for number, (_, tested) in enumerate(splitter.split(np.zeros(n_cells), labels, groups)):
            fold[tested] = number
    return fold if groups is None else _without_empty_folds(fold, groups, n_folds)


def _without_empty_folds(fold: IntArray, groups: IntArray, n_folds: int) -> IntArray:
    """Give empty folds, which stratifying few groups may leave, the smallest group of the fold with most groups."""
    sizes = np.bincount(groups)
    fold_of = np.empty(len(sizes), np.int64)
    fold_of[groups] = fold
    while len(empty := np.setdiff1d(np.arange(n_folds), fold_of)):
        fullest = np.flatnonzero(fold_of == np.bincount(fold_of).argmax())
        fold_of[fullest[sizes[fullest].argmin()]] = empty[0]
    return fold_of[groups]


def folds_directory(verb: str, given: Any, resume: Any) -> Path:
    """Return the directory of the folds' runs, in which existing runs are resumed.

    The directory is not created yet. The first run that passes all checks creates it.
    """
    check_resume(resume, given)
    if given is None:
        return Path(settings.run_dir) / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    path = Path(given)
    begun = (path / "fold-0").exists()
    if resume is True and not begun:
        raise ValueError(
            f"Expected folds to resume in {path} (resume=True), but there are none. Pass resume='auto' to start them."
        )
    if resume is False and begun:
        raise ValueError(
            f"Expected an empty run directory (resume=False), but {path} already holds folds. Pass another run_dir, or "
            "resume='auto' to resume them."
        )
    return path


def kept_predictions(run_dir: Path, spec: Mapping[str, Any], *, keep_models: bool) -> FloatArray | None:
    """Read the out-of-fold predictions of an earlier call with the same ``spec``, or return ``None``."""
    folder = _predictions(run_dir)
    if not (folder / "spec.json").is_file():
        return None
    check_same(read_json(folder / "spec.json"), _plain(spec), folder)
    if keep_models and not Run(run_dir).model.exists():
        raise ValueError(
            f"Expected the model of the finished fold in '{run_dir}', got only its predictions. An earlier call with "
            "keep_models=False removed the model. Pass another run_dir, or keep_models=False."
        )
    _remove_weights(Run(run_dir), keep_models)
    return np.load(folder / "outputs.npy", allow_pickle=False)


def keep_predictions(run_dir: Path, spec: Mapping[str, Any], outputs: FloatArray, *, keep_models: bool) -> None:
    """Write a fold's predictions to its directory, so that the next call need not train the fold again.

    Weights are removed afterwards unless ``keep_models``, because they take hundreds of megabytes a fold at base size.
    """
    folder = _predictions(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "outputs.npy", outputs)
    write_json(folder / "spec.json", spec)  # last, so that partly written predictions count as none
    _remove_weights(Run(run_dir), keep_models)


def _predictions(run_dir: Path) -> Path:
    return run_dir / "predictions"


def _plain(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Convert to the types that JSON has, because tuples come back as lists."""
    return json.loads(json.dumps(spec))


def _remove_weights(run: Run, keep_models: bool) -> None:
    if not keep_models:
        shutil.rmtree(run.model, ignore_errors=True)
        run.best.unlink(missing_ok=True)
        run.last.unlink(missing_ok=True)
        shutil.rmtree(run.checkpoints, ignore_errors=True)
