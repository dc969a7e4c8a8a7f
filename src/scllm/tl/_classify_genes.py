"""Predict labels of genes by cross-validation and compare with a baseline on simple statistics."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from scllm import _keys, metrics
from scllm._checks import check_adata, check_options
from scllm._log import log
from scllm._results import free_key, record, record_name
from scllm._typing import FloatArray, IntArray
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.lora import adapted_layers, lora_settings
from scllm.engine.objectives import LossName, loss_weights
from scllm.engine.optim import Freeze, check_freeze, frozen_weights
from scllm.models.base import CellModel
from scllm.tl._folds import folds_directory
from scllm.tl._gene_labels import GeneLabels, LabelLike, check_enough, read_labels
from scllm.tl._gene_states import choose_cells
from scllm.tl._gene_task import GeneTask, Options, gene_config
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, copy_to_train, gene_match, remember, resolve
from scllm.tl._train import check_trainable, processes

__all__ = ["classify_genes", "gene_folds"]


METRICS = ("accuracy", "macro_f1", "balanced_accuracy", "auroc", "auprc")


@closes_files
def classify_genes(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    labels: LabelLike,
    n_folds: int = 5,
    max_cells: int = 500,
    loss: LossName | Mapping[LossName, float] = "bce",
    freeze: Freeze = 0,
    baseline: bool = True,
    keep_models: bool = False,
    key_added: str = _keys.GENE_LABEL,
    **finetune_options: Any,
) -> pd.DataFrame:
    """Predict labels of genes from their hidden states in cells, each gene with a model that has not seen its label.

    You provide the labels, for example which transcription factors are dosage-sensitive, which promoters are bivalent,
    or where a gene is in a regulatory network. Genes are split into stratified cross-validation folds. In each fold, a
    linear head on gene tokens is fitted to the labels of the genes in the other folds and, by default, trained further
    together with the model. Genes of the fold itself have no label during training. They are then predicted from their
    hidden states, averaged over the cells that express them.

    Two methods are scored for comparison, in the same cells and folds. ``"baseline"`` is a logistic regression on the
    mean, the variance and the fraction of expressing cells of each gene, and on its loadings on 10 principal
    components. ``"majority"`` predicts the most frequent label.

    Parameters
    ----------
    adata
        Cells by genes.
    model
        The model to start from in each fold, or its path. ``None``: the model last recorded on ``adata``.
    labels
        Label of each gene: a Series or mapping from gene to label, a table as returned by
        :func:`scllm.datasets.gene_set` (one column besides those that name genes), or a column of ``adata.var``. Genes
        may be symbols or Ensembl ids, if ``adata.var_names`` or a column of ``adata.var`` holds them. Genes that are
        not in the data, not in the model's vocabulary or not expressed in any cell are ignored.
    n_folds
        Number of folds.
    max_cells
        Maximum number of cells over which the hidden states of each gene are averaged. Cells are drawn by name, so
        their order does not matter.
    loss
        ``"bce"`` (each label against the rest), ``"ce"``, ``"dice"``, ``"focal"``, or a mapping from losses to weights.
    freeze
        Weights that are not trained: the first n blocks, ``"encoder"`` (all but the head), or one or several patterns
        of weight names. With ``"encoder"``, hidden states are computed once for all folds, which takes as long as
        embedding the cells.
    baseline
        Whether to fit the logistic regression, too.
    keep_models
        Whether to keep the weights of each fold's model in the run directory. By default, only its predictions,
        settings and history are kept.
    key_added
        Column of ``var`` to write.
    **finetune_options
        Options of :func:`finetune`: ``epochs`` (default 3), ``lr`` (default 1e-4), ``batch_size``, ``config``,
        ``lora``, ``layer``, ``gene_key``, ``min_coverage``, ``run_dir`` (each fold is a run in ``run_dir/fold-0``,
        ...), ``resume``, ``device``, ``precision``, ``n_gpus``, ``n_procs`` and ``random_state``. Two options have
        another meaning here:

        - ``class_weight``: ``"balanced"`` (the default) gives all labels the same total weight. ``None`` gives
          calibrated probabilities and favours the frequent label.
        - ``validation``: the fraction of the *training genes* used to choose the best epoch. By default there is none,
          and the last weights are used.

        With ``freeze="encoder"`` there are no epochs, and options about them have no effect.

    Returns
    -------
    A table with one row per method and fold, indexed by ``method`` (``"model"``, ``"baseline"``, ``"majority"``) and
    ``fold``. Columns: ``accuracy``, ``macro_f1``, ``balanced_accuracy``, ``auroc`` and ``auprc`` (average precision;
    with two classes, that of the rarer one).

    Writes
    ------
    ``adata.var[key_added]``, ``adata.var[key_added + "_prob"]``
        Out-of-fold label (categorical) and its probability; missing for genes that were not labelled or not found.
    ``adata.varm[key_added + "_probabilities"]``
        Out-of-fold probability of each class, float32 ``(n_genes, n_classes)``.
    ``adata.uns["scllm"]["classify_genes"]``
        Settings, names of the ``classes``, and ``table`` with one row per method, fold and metric.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=100)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> adata.var["marker"] = adata.var_names.isin([f"gene{i}" for i in range(60)])
    >>> table = scllm.tl.classify_genes(adata, model, labels="marker", freeze="encoder")
    >>> table.index.get_level_values("method").unique().tolist()
    ['model', 'baseline', 'majority']
    """
    check_adata(adata, key_added=key_added)
    key = free_key(adata, "var", key_added)
    _check_not_overwritten(adata, labels, key)
    check_options(finetune_options, Options.__dataclass_fields__, classify_genes)
    options = Options(**finetune_options)
    _check_options(n_folds, max_cells, freeze, options)
    losses = loss_weights(loss)
    chosen = resolve(model, adata)
    _check_states(chosen)
    source = open_source(adata, layer=options.layer)
    check_layer(source, chosen, options.layer, adata)
    match = gene_match(adata, source, chosen, options.gene_key, options.min_coverage)
    found = read_labels(adata, labels, match.of_genes(source.genes, adata.var_names))
    check_enough(found, n_folds)
    initial = copy_to_train(chosen).eval()
    freeze = check_freeze(initial, freeze)
    config = gene_config(initial, options)
    seed = config.random_state or 0
    where = processes(options.n_gpus, options.n_procs, options.device)
    run_dir = None
    if freeze != "encoder":  # heads on frozen hidden states are fitted without a training run
        check_trainable(initial, freeze)
        if options.lora is not None:
            adapted_layers(initial, frozen_weights(initial, freeze))
        run_dir = folds_directory("classify_genes", options.run_dir, options.resume)

    cells = choose_cells(adata, source, match, initial, found.tokens, max_cells=max_cells, random_state=seed)
    seen = cells.n_cells > 0
    found, cells = found.take(seen), cells.take(seen)
    check_enough(found, n_folds)
    if baseline and cells.adata.n_obs < 2:
        raise ValueError(
            "Expected labelled genes to be expressed in at least 2 cells for the baseline, got 1 cell. Pass more "
            "cells, or baseline=False."
        )
    log.info(
        "classifying %s labelled genes in %s cells (%d to %d cells per gene) in %d folds",
        f"{len(found.codes):,}", f"{cells.adata.n_obs:,}", cells.n_cells.min(), cells.n_cells.max(), n_folds,
    )  # fmt: skip
    task = GeneTask(
        initial, cells, found.codes, found.classes, losses, freeze, options, config, where, run_dir,
        keep_models, key,
    )  # fmt: skip
    fold = gene_folds(found.codes, n_folds, random_state=seed)
    probabilities = {"model": task.by_model(fold)}
    if baseline:
        probabilities["baseline"] = task.by_baseline(fold)
    probabilities["majority"] = task.by_majority(fold)
    table = _table(found, fold, probabilities)
    _write(adata, found, probabilities["model"], key)
    record_name(adata, "var", key_added)
    params = {
        "labels": labels if isinstance(labels, str) else None, "n_folds": n_folds, "max_cells": max_cells,
        "loss": losses, "freeze": freeze, "baseline": baseline, "keep_models": keep_models, "key_added": key,
        "n_genes": len(found.codes), "n_cells": cells.adata.n_obs, "class_weight": options.class_weight,
        "validation": options.validation, "layer": options.layer, "run_dir": run_dir, **config.to_dict(),
    }  # fmt: skip
    record(adata, "classify_genes", params, _long(table), classes=np.array(found.classes, dtype=object))
    remember(adata, chosen)
    return table


def _check_not_overwritten(adata: AnnData, labels: LabelLike, key_added: str) -> None:
    """Raise if predictions would overwrite the labels."""
    if isinstance(labels, str) and labels in (key_added, key_added + _keys.PROBABILITY):
        raise ValueError(
            f"Expected labels and key_added to name different columns of adata.var, got labels={labels!r} and "
            f"key_added={key_added!r}: predictions would overwrite the labels. Pass another key_added."
        )


def _check_options(n_folds: int, max_cells: int, freeze: Freeze, options: Options) -> None:
    for name, value, least in (("n_folds", n_folds, 2), ("max_cells", max_cells, 1)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"Expected {name} to be a whole number of at least {least}, got {value!r}. Leave it out to use the "
                "default."
            )
    if isinstance(options.validation, str) or not 0 <= (options.validation or 0) < 1:
        raise ValueError(
            "Expected validation to be a fraction of the training genes, at least 0 and below 1, got "
            f"{options.validation!r}. Leave it out to train for all epochs."
        )
    if lora_settings(options.lora) is not None and freeze == "encoder":
        raise TypeError(
            "Expected lora= or freeze='encoder', got both: lora= adapts the encoder, and freeze='encoder' keeps it "
            "unchanged. Leave one out."
        )
    if options.class_weight not in ("balanced", None):
        raise ValueError(
            f"Expected class_weight to be 'balanced' or None, got {options.class_weight!r}. Leave it out to use "
            "'balanced'."
        )


def _check_states(model: CellModel) -> None:
    if not model.reads_genes:
        raise ValueError(
            f"Expected a model whose tokens are genes, got a {model.family} model. Pass a model of another family, "
            "such as 'scgpt' or 'geneformer'."
        )


def gene_folds(codes: IntArray, n_folds: int, *, random_state: int = 0) -> IntArray:
    """Assign each gene to a fold, stratified by class, ``(g,)``."""
    fold = np.empty(len(codes), np.int64)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=random_state)
    for number, (_, test) in enumerate(folds.split(codes, codes)):
        fold[test] = number
    return fold


def _table(found: GeneLabels, fold: IntArray, probabilities: Mapping[str, FloatArray]) -> pd.DataFrame:
    """Compute the metrics of each method on the genes of each fold."""
    names = np.array(found.classes)
    sizes = np.bincount(found.codes, minlength=len(names))
    # with two classes, precision of the rarer one over all genes, so that it is the same class in all folds
    scored = [int(sizes.argmin())] if len(names) == 2 else list(range(len(names)))
    rows = {}
    for method, outputs in probabilities.items():
        for number in range(fold.max() + 1):
            at = fold == number
            truth, output = names[found.codes[at]], outputs[at]
            scores = metrics.classification_scores(truth, names[output.argmax(1)], output, names)
            rows[method, number] = {**scores, "auprc": _average_precision(found.codes[at], output, scored)}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(METRICS))
    return table.rename_axis(["method", "fold"])


def _average_precision(codes: IntArray, outputs: FloatArray, classes: list[int]) -> float:
    """Compute the mean average precision over these classes."""
    return float(np.mean([average_precision_score(codes == k, outputs[:, k]) for k in classes]))


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with one row per method, fold and metric."""
    return table.reset_index().melt(["method", "fold"], var_name="metric")


def _write(adata: AnnData, found: GeneLabels, outputs: FloatArray, key: str) -> None:
    labelled = found.of_row >= 0
    probabilities = np.full((adata.n_vars, len(found.classes)), np.nan, np.float32)
    probabilities[labelled] = outputs[found.of_row[labelled]]
    best = np.where(labelled, np.nan_to_num(probabilities).argmax(1), -1)
    adata.var[key] = found.categories.column(np.array([*found.classes, None], dtype=object)[best])
    adata.var[key + _keys.PROBABILITY] = probabilities.max(1)
    adata.varm[key + _keys.PROBABILITIES] = probabilities
