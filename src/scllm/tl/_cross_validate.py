"""Out-of-fold predictions of a fine-tuned model, beside those of a linear one on the same folds."""

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
from scllm._log import details, log, warn
from scllm._results import drop_labels, free_key, match_settings, record, record_classes, record_name
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.fingerprint import fingerprint
from scllm.data.source import RAW, CellSource, has_layer, open_source
from scllm.data.split import PARTS, split_cells
from scllm.engine.config import TrainConfig
from scllm.models.base import CellModel
from scllm.tl._baseline import label_baseline, log_normalised, value_baseline
from scllm.tl._classify import classify
from scllm.tl._finetune import check_class_weight, finetune
from scllm.tl._folds import fold_cells, folds_directory, keep_predictions, kept_predictions
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve
from scllm.tl._out_of_fold import check_coverage, check_folds, find_groups, fold_scores, overall_scores
from scllm.tl._target import Target, find_target
from scllm.tl._train import check_config, hash_cells, hash_match

__all__ = ["cross_validate"]

_OPTIONS = inspect.signature(finetune).parameters
_OF_CLASSIFY = ("gene_key", "min_coverage", "device", "precision")


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
    """Fine-tune on all folds but one, predict that one, and so on round: every cell is predicted by a model new to it.

    Folds hold every label alike or, with ``group_key``, whole groups: labels mostly carry over worse to new donors than
    to new cells of the same donors, and new donors are mostly the question. Beside the model stands what it has to
    beat, on the same folds: logistic regression on log-normalised expression (all genes of the data; counts scaled to
    10,000 a cell, ``log1p``, C = 0.1), for values ridge regression on 50 components of an SVD of the same.

    Parameters
    ----------
    adata
        Cells by genes, in memory. Only what is named below is written; the matrix is shared, not copied.
    model
        The model to start from in each fold, or its path; ``None`` is the one recorded on ``adata`` last. If it has
        seen the labels of these cells before, the folds are of no use: a warning where it has a head on ``key``.
    key
        Column of ``obs``: categories, strings and booleans are labels, floats are values. Rows without one are left
        out.
    n_folds
        Number of folds. As many as there are groups leaves one group out at a time.
    n_repeats
        How often all is done again with other folds and another seed; the spread between repeats is what chance does.
        Where one group is left out at a time, folds stay the same and only the seed changes.
    group_key
        Column of groups (donors, studies) that are tested whole. Labels are spread over the folds as evenly as groups
        allow. If a fold has at least three training groups, its validation cells are whole groups too. With fewer, or
        if a label would be lost from training, they are single cells; the log says which. What the classification head
        reads does not change: compare ``config=TrainConfig(head_reads="inputs")`` with the default, as
        :class:`TrainConfig` explains.
    baseline
        Whether the linear model is fitted too.
    keep_models
        Whether the weights of each fold's model stay in the run directory (several hundred megabytes a fold at base
        size). By default a fold leaves its predictions, settings and history there.
    **finetune_options
        Passed on to :func:`finetune`: ``epochs=``, ``lr=``, ``freeze=``, ... ``validation`` is the share of the
        *training* cells that chooses the best weights. ``random_state`` is the seed of the first
        repeat's folds and training, one more of each further one. Folds are runs of their own in
        ``run_dir/fold-0``, ..., those of further repeats in ``run_dir/repeat-1/fold-0``, ...: the same call continues
        where an earlier one was stopped, and asked for more repeats it keeps those that are there.

    Returns
    -------
    One row a fold, indexed by ``method`` (``"baseline"``, ``"model"``), ``repeat`` and ``fold``; one column a metric:
    ``accuracy``, ``macro_f1``, ``balanced_accuracy``, ``auroc``, ``auprc``, ``ece``, see
    :func:`scllm.metrics.classification_scores`; for values ``r2``, ``pearson``, ``mae``.

    Writes
    ------
    ``adata.obs[key + "_cv"]``
        Out-of-fold label (categorical, with the categories of ``obs[key]``, their type and order) or value of the first
        repeat: a vote over repeats would be better than any one model is. Missing where ``key`` is. A ``/`` in ``key``
        becomes ``_``. With ``baseline``, ``key + "_cv_baseline"`` likewise.
    ``adata.obs[key + "_cv_prob"]``, ``adata.obsm[key + "_cv_probabilities"]``
        Probability of the label, and of all, float32 ``(n_cells, n_classes)``; for the baseline likewise.
    ``adata.obs[key + "_cv_fold"]``
        The fold of the first repeat that tested the cell (categorical).
    ``adata.uns["scllm"]["cross_validate"]``
        Settings; ``classes``; ``table``: one row a method, repeat, fold and metric, and ``f1`` of each class;
        ``overall``: metrics of all out-of-fold predictions of the first repeat, with a 95 % bootstrap interval
        (drawing whole groups with ``group_key``).

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
    if key in chosen.heads_on("cell"):
        warn(
            f"The model was already fine-tuned on a column {key!r}. If it was trained on the labels of these cells, "
            "every score is too high. Pass the pretrained model."
        )
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
        # the first fold says what all of them do
        with details() if repeat or fold else nullcontext():
            found = {"model": cells.by_model(chosen, training, tested, seeded, where, keep_models=keep_models)}
        if baseline:
            found["baseline"] = cells.by_baseline(training, tested)
        for method, outputs in found.items():
            tables.append(fold_scores(target, tested, outputs).assign(method=method, repeat=repeat, fold=fold))
            if repeat == 0:
                first[method][tested] = outputs
        _say(tables[-len(found) :], repeat * n_folds + fold + 1, n_repeats * n_folds)
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


@dataclass(frozen=True)
class _Cells:
    """Cells to train on and to test: the matrix of the caller (from ``layer``) as X, and tables of our own."""

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
        # a matrix stored by columns is converted here, not in every fold
        light = AnnData(_by_rows(matrix), obs=adata.obs[[target.key]], var=var, uns={_keys.UNS: matched})
        return cls(light, target, layer, groups)

    @cached_property
    def logged(self) -> CSR:
        """What the linear model reads: made after the first fold's model has found the matrix fit to read."""
        return log_normalised(self.adata.X)

    @cached_property
    def source(self) -> CellSource:
        """The rows of the matrix."""
        return open_source(self.adata)

    @cached_property
    def fingerprint(self) -> str:
        """Of the matrix and its genes."""
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
        """Fine-tune and predict, unless an earlier call did."""
        spec = self._spec(model, training, tested, options)
        found = kept_predictions(run_dir, spec, keep_models=keep_models)
        if found is None:
            found = self._predicted(model, training, tested, options, run_dir)
            keep_predictions(run_dir, spec, found, keep_models=keep_models)
        return found

    def _spec(
        self, model: CellModel, training: IntArray, tested: IntArray, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What a fold's predictions depend on."""
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
                "fingerprint": self.fingerprint, "layer": self.layer, "cells": hash_cells(cells),
                "tokens": hash_match(gene_match(self.adata, self.source, model, **matching)),
                **matching,
            },
        }  # fmt: skip

    def _predicted(
        self, model: CellModel, training: IntArray, tested: IntArray, options: dict[str, Any], run_dir: Path
    ) -> FloatArray:
        """Outputs of a model fine-tuned on the training cells, ``(n_tested, k)``."""
        share = options.pop("validation", _OPTIONS["validation"].default)
        with warnings.catch_warnings():
            # said once for all folds
            said = r"have no (label|finite value)|have one cell only|are among the validation cells"
            warnings.filterwarnings("ignore", message=rf".* ({said}|values that are not integers)")
            if share:
                part = f"{self.target.key}_{_keys.SPLIT}"
                self.adata.obs[part] = self._parts(training, share, options["random_state"])
                data, options["validation"] = self.adata, part
            else:
                data, options["validation"] = self.adata[training].copy(), share
                if isinstance(options.get("class_weight"), Mapping):  # some labels are those of tested cells alone
                    there = set(data.obs[self.target.key].astype(str))
                    options["class_weight"] = {
                        name: weight for name, weight in options["class_weight"].items() if str(name) in there
                    }
            tuned = finetune(data, model, key=self.target.key, run_dir=run_dir, **options)
        test = self.adata[tested].copy()
        del test.obs[self.target.key]  # nothing to be warned of: labels that the fold tests alone were named before
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
        """Fit the linear model and predict."""
        known, new = self.logged[training], self.logged[tested]
        if self.target.classes is None:
            return value_baseline(known, self.target.column[training], new)[:, None]
        return label_baseline(known, self.target.column[training], new, self.target.n_outputs)

    def _parts(self, training: IntArray, share: float, seed: int) -> pd.Categorical:
        """``train`` and ``validation`` among the training cells; all else is ``test``, which is never touched."""
        share = min(max(share, 1 / len(training)), 1 - 1 / len(training))
        part = self._part_by_group(training, share, seed)
        if part is None:
            labels = None if self.target.classes is None else pd.Series(self.target.column[training])
            part = split_cells(len(training), (1 - share, share), stratify=labels, random_state=seed)
        parts = np.full(self.adata.n_obs, PARTS.index("test"))
        parts[training] = part
        return pd.Categorical.from_codes(parts, categories=list(PARTS))

    def _part_by_group(self, training: IntArray, share: float, seed: int) -> IntArray | None:
        """0 for training and 1 for validation by whole groups; ``None`` where groups do not allow it."""
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
    """Options of ``finetune`` and the seed; an error for what no fold could use."""
    options = dict(given)
    check_config(options.get("config"))
    check_options(options, [name for name in _OPTIONS if name not in ("data", "model", "key")], cross_validate)
    share = options.get("validation", _OPTIONS["validation"].default)
    if isinstance(share, str) or not 0 <= (share or 0) < 1:
        raise ValueError(
            f"Expected validation to be a share of the training cells, at least 0 and below 1, got {share!r}. The "
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
    """The fold that tests each cell, -1 for cells without a label, ``(n_cells,)``."""
    there = np.flatnonzero(target.is_there)
    fold = np.full(len(target.column), -1)
    fold[there] = fold_cells(
        len(there), n_folds, codes=None if target.classes is None else target.column[there],
        groups=None if groups is None else groups[there], random_state=seed,
    )  # fmt: skip
    return fold


def _say(tables: list[pd.DataFrame], number: int, n: int) -> None:
    """Log what came out of a fold, the first metric of each method."""
    scores = [table.iloc[0] for table in tables]
    log.info("fold %d of %d: %s %s", number, n, scores[0]["metric"],
             ", ".join(f"{score['value']:.3f} ({score['method']})" for score in scores))  # fmt: skip


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    """Folds by metrics."""
    metrics = table[table["class"].isna()]
    wide = metrics.pivot(index=["method", "repeat", "fold"], columns="metric", values="value")
    return wide[metrics["metric"].unique()].rename_axis(columns=None)


def _write(adata: AnnData, target: Target, fold: IntArray, outputs: Mapping[str, FloatArray]) -> None:
    """Predictions of the first repeat, and its folds, in place of an earlier call's."""
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
