"""Cross-validate fine-tuning, with a linear baseline on the same folds."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scllm import _keys
from scllm._checks import check_adata, check_options
from scllm._log import DataWarning, details, log, warn
from scllm._results import drop_labels, free_key, match_settings, record, record_classes, record_name
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.fingerprint import fingerprint, hash_arrays, hash_match
from scllm.data.opened import closes_files
from scllm.data.source import RAW, has_layer, open_source
from scllm.data.split import PARTS, split_cells
from scllm.engine.config import TrainConfig
from scllm.models.base import CellModel
from scllm.tl._baseline import label_baseline, log_normalised, value_baseline
from scllm.tl._classify import classify
from scllm.tl._finetune import check_class_weight, finetune
from scllm.tl._folds import fold_cells, folds_directory, keep_predictions, kept_predictions
from scllm.tl._inputs import check_layer
from scllm.tl._ledger import warn_of_seen
from scllm.tl._model import ModelLike, gene_match, remember, resolve
from scllm.tl._out_of_fold import check_coverage, check_folds, find_groups, fold_scores, overall_scores
from scllm.tl._target import Target, find_target
from scllm.tl._train import check_config

__all__ = ["cross_validate"]

_OPTIONS = inspect.signature(finetune).parameters
_OF_CLASSIFY = ("gene_key", "min_coverage", "device", "precision")


@closes_files
def cross_validate(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    key: str,
    n_folds: int = 5,
    n_repeats: int = 1,
    group_key: str | None = None,
    baseline: bool = True,
    keep_models: bool = False,
    **finetune_options: Any,
) -> pd.DataFrame:
    """Fine-tune and test a model by cross-validation, so that each cell is predicted by a model not trained on it.

    Folds are stratified by label or, with ``group_key``, made of whole groups. Labels usually transfer less well to new
    donors than to new cells of the same donors, and new donors are usually what matters. A linear baseline is evaluated
    on the same folds. For labels, it is logistic regression on log-normalised expression (all genes of the data, counts
    scaled to 10,000 per cell, ``log1p``, C = 0.1). For values, it is ridge regression on 50 SVD components of the same
    matrix.

    Parameters
    ----------
    adata
        Cells by genes, in memory. Only the entries named below are written; the matrix is shared, not copied.
    model
        The model to start from in each fold, or its path. ``None``: the one last recorded on ``adata``. If the model
        was trained on the labels of these cells before, all scores are too high; a warning says so if it has a head on
        ``key``. Another one says how many cells come from donors or data sets that the model was trained on.
    key
        Column of ``obs``: categories, strings and booleans are labels, floats are values. Cells without one are
        ignored.
    n_folds
        Number of folds. With as many folds as groups, one group is left out at a time.
    n_repeats
        Number of times the cross-validation is done, each with other folds and another seed. The differences between
        repeats show the effect of chance. If one group is left out at a time, the folds stay the same and only the seed
        changes.
    group_key
        Column of groups (donors, studies) that are tested whole. Labels are spread over the folds as evenly as groups
        allow. If a fold has at least three training groups, its validation cells are whole groups too. With fewer, or
        if training would lose a label, they are single cells; the log says which. The classification head does not
        change: compare ``config=TrainConfig(head_reads="inputs")`` with the default, as :class:`TrainConfig` explains.
    baseline
        Whether to fit the linear baseline too.
    keep_models
        Whether to keep the weights of each fold's model in the run directory (several hundred megabytes per fold at
        base size). By default, only the predictions, settings and history of each fold are kept.
    **finetune_options
        Passed on to :func:`finetune`: ``epochs=``, ``lr=``, ``freeze=``, ... ``validation`` is the fraction of the
        *training* cells with which the best weights are chosen. ``random_state`` is the seed for the folds and the
        training of the first repeat; each further repeat adds one. Folds are separate runs in ``run_dir/fold-0``, ...,
        and those of further repeats in ``run_dir/repeat-1/fold-0``, .... The same call resumes an interrupted one. A
        call with more repeats keeps the finished ones.

    Returns
    -------
    One row per fold, indexed by ``method`` (``"baseline"``, ``"model"``), ``repeat`` and ``fold``, and one column per
    metric: ``accuracy``, ``macro_f1``, ``balanced_accuracy``, ``auroc``, ``auprc``, ``ece``, see
    :func:`scllm.metrics.classification_scores`; for values ``r2``, ``pearson``, ``mae``.

    Writes
    ------
    ``adata.obs[key + "_cv"]``
        Out-of-fold label (categorical, with the categories of ``obs[key]``, their type and order) or value of the first
        repeat. It is not a majority vote over repeats, which would be better than any single model. Missing where
        ``key`` is missing. A ``/`` in ``key`` becomes ``_``. With ``baseline``, also ``key + "_cv_baseline"``.
    ``adata.obs[key + "_cv_prob"]``, ``adata.obsm[key + "_cv_probabilities"]``
        Probability of the label, and of all labels, float32 ``(n_cells, n_classes)``; likewise for the baseline.
    ``adata.obs[key + "_cv_fold"]``
        The fold of the first repeat that tested the cell (categorical).
    ``adata.uns["scllm"]["cross_validate"]``
        Settings; ``classes``; ``table``: one row per method, repeat, fold and metric, and ``f1`` of each class;
        ``overall``: metrics of all out-of-fold predictions of the first repeat, with a 95 % bootstrap confidence
        interval (resampling whole groups with ``group_key``).

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=200)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> table = scllm.tl.cross_validate(adata, model, key="cell_type", epochs=1)  # doctest: +SKIP
    >>> table.groupby("method").mean()  # doctest: +SKIP
    """
    check_adata(adata)
    if adata.isbacked:
        raise ValueError("Expected adata in memory, but it is backed by a file. Pass adata.to_memory().")
    if not isinstance(key, str):
        raise TypeError(f"Expected key to be one column of obs, got {key!r}. Call cross_validate once for each column.")
    target = find_target(adata.obs, key)
    free_key(adata, "obs", key + _keys.CROSS_VALIDATED)
    groups = find_groups(adata.obs, group_key, target)
    options, seed = _checked(finetune_options)
    layer = options.pop("layer", None)
    cells = _Cells.of(adata, target, layer, groups)
    if target.classes is not None and isinstance(options.get("class_weight"), Mapping):
        check_class_weight(options["class_weight"], [target])
    check_folds(target, groups, n_folds, n_repeats, group_key)
    chosen = resolve(model, adata)
    _warn_of_leaks(chosen, key, adata.obs[target.is_there])
    config = options["config"] = options.get("config") or TrainConfig()
    check_layer(cells.source, chosen, layer, adata, downsample=config.downsample or 0.0)
    folds = [_folds(target, groups, n_folds, seed + repeat) for repeat in range(n_repeats)]
    check_coverage(target, folds)
    run_dir = folds_directory("cross_validate", options.pop("run_dir", None), options.pop("resume", "auto"))
    methods = ("model", "baseline") if baseline else ("model",)
    tables, first = [], {method: np.full((adata.n_obs, target.n_outputs), np.nan, np.float32) for method in methods}
    log.info("cross-validating obs[%r], training one model in each of %d folds", key, n_repeats * n_folds)
    for repeat, fold in np.ndindex(n_repeats, n_folds):
        tested = np.flatnonzero(folds[repeat] == fold)
        training = np.flatnonzero((folds[repeat] >= 0) & (folds[repeat] != fold))
        where = run_dir / f"repeat-{repeat}" / f"fold-{fold}" if repeat else run_dir / f"fold-{fold}"
        seeded = {**options, "random_state": seed + repeat}
        # Only the first fold logs at the usual level, because the others would repeat the same lines.
        with details() if repeat or fold else nullcontext():
            found = {"model": cells.by_model(chosen, training, tested, seeded, where, keep_models=keep_models)}
        if baseline:
            found["baseline"] = cells.by_baseline(training, tested)
        for method, outputs in found.items():
            tables.append(fold_scores(target, tested, outputs).assign(method=method, repeat=repeat, fold=fold))
            if repeat == 0:
                first[method][tested] = outputs
        _log_scores(tables[-len(found) :], repeat * n_folds + fold + 1, n_repeats * n_folds)
    table = pd.concat(tables, ignore_index=True)
    overall = pd.concat(
        [overall_scores(target, outputs, groups, seed).assign(method=method) for method, outputs in first.items()],
        ignore_index=True,
    )
    _write(adata, target, folds[0], first)
    params = {
        "key": key, "n_folds": n_folds, "n_repeats": n_repeats, "group_key": group_key, "baseline": baseline,
        "keep_models": keep_models, "run_dir": run_dir,
        "options": {name: str(value) for name, value in finetune_options.items()},
    }  # fmt: skip
    classes = None if target.classes is None else np.array(target.classes, dtype=object)
    order = ["method", "repeat", "fold", "metric", "class", "n_cells", "value"]
    overall = overall[["method", *overall.columns[:-1]]]
    record(adata, "cross_validate", params, table[order], overall=overall, classes=classes)
    remember(adata, chosen)
    return _wide(table)


def _warn_of_leaks(model: CellModel, key: str, obs: pd.DataFrame) -> None:
    """Warn if the model may have been trained on the labels or the donors of these cells."""
    if key in model.heads_on("cell"):
        warn(
            f"The model was already fine-tuned on a column {key!r}. If it was trained on the labels of these cells, "
            "every score is too high. Pass the pretrained model."
        )
    warn_of_seen(model.trained_on, obs)


@dataclass(frozen=True)
class _Cells:
    """Cells to train on and to test: the caller's matrix (from ``layer``) as ``X``, with separate tables."""

    adata: AnnData
    target: Target
    layer: str | None
    groups: IntArray | None

    @classmethod
    def of(cls, adata: AnnData, target: Target, layer: str | None, groups: IntArray | None) -> _Cells:
        matched = {name: value for name, value in adata.uns.get(_keys.UNS, {}).items() if name == "match_genes"}
        open_source(adata[:0], layer=layer)  # an error if there is no such layer; no cell is converted for it
        if layer == RAW and not has_layer(adata, RAW):
            matrix, var = adata.raw.X, adata.raw.var
        else:
            matrix, var = adata.X if layer is None else adata.layers[layer], adata.var
        # A matrix stored by columns is converted once here and not in every fold.
        light = AnnData(_by_rows(matrix), obs=adata.obs[[target.key]], var=var, uns={_keys.UNS: matched})
        return cls(light, target, layer, groups)

    @cached_property
    def logged(self) -> CSR:
        """The input of the linear baseline, computed only after the first fold has checked the matrix."""
        return log_normalised(self.adata.X)

    @cached_property
    def source(self) -> CellSource:
        """The rows of the matrix."""
        return open_source(self.adata)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the matrix and its genes."""
        return fingerprint(self.source)

    def by_model(
        self,
        model: CellModel,
        training: IntArray,
        tested: IntArray,
        options: dict[str, Any],
        run_dir: Path,
        *,
        keep_models: bool,
    ) -> FloatArray:
        """Fine-tune and predict, or read the predictions of an earlier call."""
        spec = self._spec(model, training, tested, options)
        found = kept_predictions(run_dir, spec, keep_models=keep_models)
        if found is None:
            found = self._predicted(model, training, tested, options, run_dir)
            keep_predictions(run_dir, spec, found, keep_models=keep_models)
        return found

    def _spec(
        self, model: CellModel, training: IntArray, tested: IntArray, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Describe everything that a fold's predictions depend on."""
        free = ("config", "device", "n_gpus", "n_procs", "precision")
        cells = {"training": training, "tested": tested, "labels": self.target.column}
        if self.groups is not None:  # validation cells are whole groups
            cells["groups"] = self.groups
        matching = match_settings(self.adata, options.get("gene_key"), options.get("min_coverage"))
        return {
            "weights": model.hash(),
            "config": {**options["config"].to_dict(), "precision": None},
            "options": {name: str(value) for name, value in options.items() if name not in free},
            "classes": self.target.classes,
            "data": {
                "fingerprint": self.fingerprint,
                "layer": self.layer,
                "cells": hash_arrays(cells),
                "tokens": hash_match(gene_match(self.adata, self.source, model, **matching)),
                **matching,
            },
        }

    def _predicted(
        self, model: CellModel, training: IntArray, tested: IntArray, options: dict[str, Any], run_dir: Path
    ) -> FloatArray:
        """Fine-tune on the training cells and predict the tested ones, ``(n_tested, k)``."""
        share = options.pop("validation", _OPTIONS["validation"].default)
        with warnings.catch_warnings():
            # The caller has already warned of these once for all folds.
            warnings.simplefilter("ignore", DataWarning)
            if share:
                part = f"{self.target.key}_{_keys.SPLIT}"
                self.adata.obs[part] = self._parts(training, share, options["random_state"])
                data, options["validation"] = self.adata, part
            else:
                data, options["validation"] = self.adata[training].copy(), share
                if isinstance(options.get("class_weight"), Mapping):  # only tested cells may have some labels
                    there = set(data.obs[self.target.key].astype(str))
                    options["class_weight"] = {
                        name: weight for name, weight in options["class_weight"].items() if str(name) in there
                    }
            tuned = finetune(data, model, key=self.target.key, run_dir=run_dir, **options)
        test = self.adata[tested].copy()
        del test.obs[self.target.key]  # otherwise classify would warn again of labels in one fold only
        with details():
            classify(test, tuned, **{name: options[name] for name in _OF_CLASSIFY if name in options})
        if self.target.classes is None:
            return test.obs[[_keys.LABEL]].to_numpy()
        names = list(test.uns[_keys.UNS]["classify"]["classes"])
        probabilities = np.zeros((len(tested), self.target.n_outputs), np.float32)
        probabilities[:, pd.Index(self.target.classes).get_indexer(names)] = test.obsm[
            _keys.LABEL + _keys.PROBABILITIES
        ]
        return probabilities

    def by_baseline(self, training: IntArray, tested: IntArray) -> FloatArray:
        """Fit the linear baseline and predict."""
        known, new = self.logged[training], self.logged[tested]
        if self.target.classes is None:
            return value_baseline(known, self.target.column[training], new)[:, None]
        return label_baseline(known, self.target.column[training], new, self.target.n_outputs)

    def _parts(self, training: IntArray, share: float, seed: int) -> pd.Categorical:
        """Split the training cells into ``train`` and ``validation``; all other cells are ``test`` and stay unused."""
        share = min(max(share, 1 / len(training)), 1 - 1 / len(training))
        part = self._part_by_group(training, share, seed)
        if part is None:
            labels = None if self.target.classes is None else pd.Series(self.target.column[training])
            part = split_cells(len(training), (1 - share, share), stratify=labels, random_state=seed)
        parts = np.full(self.adata.n_obs, PARTS.index("test"))
        parts[training] = part
        return pd.Categorical.from_codes(parts, categories=list(PARTS))

    def _part_by_group(self, training: IntArray, share: float, seed: int) -> IntArray | None:
        """Assign whole groups to training (0) or validation (1); return ``None`` if the groups do not allow it."""
        if self.groups is None:
            return None
        of_cell = pd.Series(self.groups[training])
        if of_cell.nunique() < 3:
            log.info("validating on single cells, because %d groups are too few to hold one out", of_cell.nunique())
            return None
        part = split_cells(len(training), (1 - share, share), groups=of_cell, random_state=seed)
        labels = self.target.column[training]
        if self.target.classes is not None and len(np.unique(labels[part == 0])) < len(np.unique(labels)):
            log.info("validating on single cells, because holding out whole groups would leave a label untrained")
            return None
        n_held_out = of_cell[part == 1].nunique()
        log.info("validating on whole groups: %d of the %d training groups", n_held_out, of_cell.nunique())
        return part


def _by_rows(matrix: Any) -> Any:
    return matrix.tocsr() if sparse.issparse(matrix) else matrix


def _checked(given: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the options of ``finetune`` and the seed; raise on options that no fold could use."""
    options = dict(given)
    check_config(options.get("config"))
    check_options(options, [name for name in _OPTIONS if name not in ("data", "model", "key")], cross_validate)
    share = options.get("validation", _OPTIONS["validation"].default)
    if isinstance(share, str) or not 0 <= (share or 0) < 1:
        raise ValueError(
            f"Expected validation to be a fraction of the training cells, at least 0 and below 1, got {share!r}. The "
            "folds determine which cells are tested. Leave validation out."
        )
    config = options.get("config")
    set_there = None if config is None else config.random_state
    seed = options.pop("random_state", 0)
    if set_there is not None and seed:
        raise TypeError(
            f"Expected random_state once, got {seed} as an argument and {set_there} in config. Leave one out."
        )
    if config is not None:
        options["config"] = replace(config, random_state=None)
        seed = config.random_state or seed
    return options, int(TrainConfig(random_state=seed).random_state or 0)


def _folds(target: Target, groups: IntArray | None, n_folds: int, seed: int) -> IntArray:
    """Assign each cell to the fold that tests it, -1 for cells without a label or value, ``(n_cells,)``."""
    there = np.flatnonzero(target.is_there)
    fold = np.full(len(target.column), -1)
    fold[there] = fold_cells(
        len(there),
        n_folds,
        codes=None if target.classes is None else target.column[there],
        groups=None if groups is None else groups[there],
        random_state=seed,
    )
    return fold


def _log_scores(tables: list[pd.DataFrame], number: int, n: int) -> None:
    """Log the first metric of each method on a fold."""
    scores = [table.iloc[0] for table in tables]
    log.info(
        "fold %d of %d: %s %s",
        number,
        n,
        scores[0]["metric"],
        ", ".join(f"{score['value']:.3f} ({score['method']})" for score in scores),
    )


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    """Arrange the metrics with one row per fold and one column per metric."""
    metrics = table[table["class"].isna()]
    wide = metrics.pivot(index=["method", "repeat", "fold"], columns="metric", values="value")
    return wide[metrics["metric"].unique()].rename_axis(columns=None)


def _write(adata: AnnData, target: Target, fold: IntArray, outputs: Mapping[str, FloatArray]) -> None:
    """Write the predictions and folds of the first repeat, replacing those of an earlier call."""
    name = target.key + _keys.CROSS_VALIDATED
    record_name(adata, "obs", name)
    names = {"model": _keys.safe(name), "baseline": _keys.safe(name) + _keys.BASELINE}
    for column in names.values():
        drop_labels(adata, column)
    for method, found in outputs.items():
        column = names[method]
        if target.classes is None or target.categories is None:
            adata.obs[column] = found[:, 0]
            continue
        best = np.where(target.is_there, np.nan_to_num(found, nan=-1).argmax(axis=1), -1)
        adata.obs[column] = target.categories.column(np.array([*target.classes, None], dtype=object)[best])
        adata.obs[column + _keys.PROBABILITY] = found.max(axis=1)
        adata.obsm[column + _keys.PROBABILITIES] = found
        record_classes(adata, column, target.classes)
    folds = [str(number) for number in range(fold.max() + 1)]
    adata.obs[names["model"] + _keys.FOLD] = pd.Categorical.from_codes(fold, categories=folds)
