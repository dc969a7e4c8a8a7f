"""Fine-tune a model on labels or values of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scllm import _keys, models
from scllm._checks import check_adata, missing_key
from scllm._log import DataWarning, log, warn
from scllm._names import listed
from scllm._results import match_settings
from scllm._typing import FloatArray, HeadSetting, IntArray
from scllm.data.cells import CellSource
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.config import Precision, TrainConfig
from scllm.engine.lora import Lora, LoraSettings, lora_settings
from scllm.engine.objectives import Label, LossName, loss_weights
from scllm.engine.optim import Freeze, check_freeze
from scllm.engine.spec import Cells
from scllm.models.base import CellModel, HeadSpec
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, copy_to_train, resolve
from scllm.tl._parts import column_or_all, divide, mixture
from scllm.tl._target import Target, find_target
from scllm.tl._train import Data, Training, check_config, merged_config, processes, train

__all__ = ["check_class_weight", "finetune"]


@closes_files
def finetune(
    data: Data,
    model: ModelLike | None = None,
    *,
    key: str | Sequence[str],
    freeze: Freeze = 0,
    loss: LossName | Mapping[LossName, float] = "ce",
    upsample: bool = False,
    class_weight: Literal["balanced"] | Mapping[str, float] | None = None,
    lora: Lora | None = None,
    validation: float | str = 0.1,
    group_key: str | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    n_gpus: int | None = None,
    n_procs: int | None = None,
    device: str = "auto",
    run_dir: str | PathLike[str] | None = None,
    precision: Precision = "auto",
    resume: Literal["auto"] | bool = "auto",
    config: TrainConfig | None = None,
    random_state: int = 0,
) -> CellModel:
    """Train a head that predicts ``obs[key]``, together with the model.

    The classification head is linear. Its input is the rank-weighted mean of the gene embeddings
    (``pooling="ranked"`` of :func:`embed`; geneformer uses ``"linear"`` after the last block), taken both before the
    first transformer block and after the last one. The head is first initialised by logistic regression on frozen
    embeddings, which takes seconds. Then all weights that are not frozen are trained, without dropout (scbert keeps
    its dropout). The weights with the best validation loss are kept, where the initial weights count too. The
    probabilities are calibrated on the validation cells.

    Two other heads can be chosen, see :class:`TrainConfig`. ``config=TrainConfig(head_reads="inputs")`` reads only the
    embeddings before the first block, which generalise best to new donors and studies.
    ``TrainConfig(head_reads="published")`` makes heads like those of the published checkpoints; scbert and scfoundation
    have no others. The head of scbert reads every position and is not initialised on frozen embeddings.

    Parameters
    ----------
    data
        An AnnData, which may be backed; a path to ``.h5ad`` or ``.zarr``; a TileDB-SOMA or its address; a collection
        of annbatch; or a list or a folder of these.
    model
        The model to start from, or its path; it is not changed. ``None``: the one last recorded on ``data``.
    key
        Column of ``obs``, or several columns for several heads. Categories, strings and booleans are labels, floats are
        values. A head is trained without the cells whose label is missing.
    freeze
        Weights that are not trained: those of the first n blocks, ``"encoder"`` (all but the heads), a pattern of
        weight names, or a list of patterns.
    loss
        ``"ce"`` (cross-entropy), ``"bce"``, ``"dice"``, ``"focal"``, or a mapping of several losses to their weights.
    upsample
        Whether to draw cells of rare labels (of the first ``key`` with labels) more often, so that every label is drawn
        equally often.
    class_weight
        ``"balanced"`` (inverse to the frequency of the label), or a mapping of labels to weights. ``None``: all cells
        have the same weight.
    lora
        Rank of low-rank adapters that are trained instead of the blocks' weights and merged into them at the end. Also
        a :class:`scllm.tl.LoraSettings`, or a ``peft.LoraConfig`` of rank, alpha and dropout. Needs peft.
    validation
        Fraction of cells held out, stratified by label; or a column of ``obs`` written by :func:`scllm.pp.split`.
    group_key
        Column of groups (donors, studies) that are held out whole for validation. Pass it to label cells of other
        groups: weights are then chosen, and probabilities calibrated, on groups unseen in training.
    layer
        Layer to read. ``None``: ``X``.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: the one of an earlier
        :func:`scllm.pp.match_genes`, or else the one that matches best.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: the one of an earlier
        :func:`scllm.pp.match_genes`, or else 0.3.
    epochs
        Passes over the cells. ``None``: the default of the family (3; scbert: 10).
    batch_size
        Cells per optimiser step, over all processes. ``None``: the default of the family (32; scbert: 8).
    lr
        Peak learning rate (3e-5; scbert: 1e-4). It is reached after 20 steps and then decreases to zero.
    n_gpus
        Number of GPUs, with one process each. ``None``: all available GPUs, or else one CPU process.
    n_procs
        Number of CPU processes, with ``device="cpu"``.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    run_dir
        Directory in which the run is written and resumed. ``None``: a new one under ``scllm.settings.run_dir``.
    precision
        ``"auto"``: fp32 on a CPU, bf16 on a GPU that supports it.
    resume
        ``"auto"`` resumes a run with the same settings in ``run_dir``, if there is one. ``True`` requires such a run,
        ``False`` requires an empty directory.
    config
        Further settings, see :class:`scllm.tl.TrainConfig`. Passing a value both ways is a ``TypeError``.
    random_state
        Seed for splitting, data order, random subsets of genes, and dropout if it is used.

    Returns
    -------
    The fine-tuned model with the weights of the best validation loss, and its ``history``.

    Writes
    ------
    ``adata.uns["scllm"]["finetune"]``
        Settings, and the history as ``table``, thinned to 2,000 rows if it is longer. ``history`` of the model has all
        rows.
    ``adata.uns["scllm"]["model"]``
        Path, family and hash of the model.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> tuned = scllm.tl.finetune(adata, model, key="cell_type", epochs=1)  # doctest: +SKIP
    """
    adata = data if isinstance(data, AnnData) else None
    if adata is not None:
        check_adata(adata)
    check_config(config)
    keys = _names(key)
    source = open_source(data, layer=layer)
    targets = [_target(source, name) for name in keys]
    where = processes(n_gpus, n_procs, device)
    begun = copy_to_train(resolve(model, adata))
    _warn_if_tuned_before(begun, keys, model)
    check_layer(source, begun, layer, data, downsample=0.0 if config is None else config.downsample or 0.0)
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    settings = merged_config(config, given, _defaults(begun), precision=precision, random_state=random_state)
    seed = settings.random_state
    adapters = _adapters(lora, settings.head_reads)

    there = np.any([target.is_there for target in targets], axis=0)
    labelled = next((target for target in targets if target.classes is not None), None)
    if labelled is None:
        _check_is_for_values(loss, settings.label_smoothing, keys[0])
    stratify = None if labelled is None else pd.Series(labelled.column[there])
    training, held_out = divide(
        source, validation, group_key=group_key, stratify=stratify, rows=np.flatnonzero(there), random_state=seed
    )
    specs = [_head(target, training) for target in targets]
    targets = _to_validate(targets, training, held_out)
    columns = {t.key: t.column.astype(np.float32) if t.classes is None else t.column for t in targets}
    weights = _weights(source, targets, training, settings.group_weights, upsample=upsample)
    cells = Cells(training, held_out, columns, weights)
    objective = Label(
        loss=loss_weights(loss),
        class_weight=_class_weights(class_weight, targets, training),
        label_smoothing=settings.label_smoothing,
    )
    assert settings.head_reads is not None
    _set_heads(begun, specs, settings.head_reads, seed)
    params = {"key": keys, "upsample": upsample, "class_weight": class_weight}
    params |= {"validation": validation, "group_key": group_key, "layer": layer}
    matching, freeze = match_settings(data, gene_key, min_coverage), check_freeze(begun, freeze)
    prepared = Training(
        "finetune", data, source, matching, begun, objective, settings, cells, where, params, freeze, adapters
    )
    return train(prepared, run_dir=run_dir, resume=resume)


def _defaults(model: CellModel) -> dict[str, Any]:
    """Return the settings of fine-tuning that the user has not set."""
    return {
        **models.family_module(model.family).FINETUNE,
        "gene_init": "random",
        "use_dropout": not model.heads_read_cells,
        "head_reads": "published" if model.head_pooling is None else "both",
        "max_len": models.training_length(model.family, model.config),
        "schedule": "linear",
        "warmup": 20,
    }


def _warn_if_tuned_before(begun: CellModel, keys: Sequence[str], given: ModelLike | None) -> None:
    """Warn if a call without ``model`` starts from a model that an earlier call fine-tuned on the same column."""
    before = [key for key in begun.heads_on("cell") if key in keys]
    if given is None and before:
        warn(
            f"The model recorded on the data was already fine-tuned on {before[0]!r}. It may have been trained on "
            "cells that now validate it, which makes scores too high. Pass the pretrained model as model=."
        )


def _check_is_for_values(loss: LossName | Mapping[LossName, float], label_smoothing: float, key: str) -> None:
    """Raise if the loss or label smoothing is for labels, because the column holds values."""
    if loss == "ce" and not label_smoothing:
        return
    given = f"loss={loss!r}" if loss != "ce" else f"label_smoothing={label_smoothing}"
    raise TypeError(
        f"{given} is for labels, but obs[{key!r}] holds values, whose loss is the squared error. Leave it out."
    )


def _names(key: str | Sequence[str]) -> list[str]:
    """Return the columns to predict as a list."""
    if not isinstance(key, (str, Sequence)):
        raise TypeError(f"Expected key to be a column of obs or a list of columns, got {key!r}. Pass their names.")
    keys = [key] if isinstance(key, str) else list(key)
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"Expected key to be one or several different columns of obs, got {keys}. Name each once.")
    if len({_keys.safe(str(name)) for name in keys}) < len(keys):
        raise ValueError(
            f"Expected keys that still differ when '/' is replaced by '_' in the results, got {keys}. Rename one."
        )
    return keys


def _adapters(lora: Lora | None, reads: HeadSetting | None) -> LoraSettings | None:
    """Return the settings of the LoRA adapters, or ``None`` without adapters."""
    if lora is not None and reads == "inputs":
        raise TypeError(
            "Expected head_reads='both' or 'last' with lora=, got 'inputs'. Adapters change the blocks, but heads on "
            "the inputs read only the embeddings before the first block. Leave one of the two out."
        )
    return lora_settings(lora)


def _target(source: CellSource, key: str) -> Target:
    """Read the column to predict; raise if no label has two cells, and warn if some have only one."""
    target = find_target(source.obs(column_or_all(source, key)), key)
    if target.classes is not None:
        single = np.flatnonzero(target.counts(np.arange(source.n_obs)) == 1)
        if len(single) == len(target.classes):
            raise ValueError(
                f"Expected labels with several cells each, but all {len(single)} labels of obs[{key!r}] have one cell "
                f"only (first: {target.classes[0]!r}). {target.advice}"
            )
        if len(single):
            warn(
                f"Labels of obs[{key!r}] with only one cell cannot be both trained and validated: "
                f"{listed(target.classes[i] for i in single)}. {target.advice}",
                DataWarning,
            )
    return target


def _head(target: Target, training: IntArray) -> HeadSpec:
    """Specify the head, with mean and std of the training values; raise if all training cells have the same label."""
    seen = target.column[training][target.is_there[training]]
    if len(np.unique(seen)) < 2:
        what = "values" if target.classes is None else "labels"
        raise ValueError(
            f"Expected training cells with at least 2 distinct {what} in obs[{target.key!r}], got "
            f"{len(np.unique(seen))}. Pass another column, hold out other groups, or hold out fewer cells."
        )
    if target.classes is not None:
        return HeadSpec(target.key, target.classes, categories=target.categories)
    return HeadSpec(target.key, None, mean=float(seen.mean()), std=float(seen.std()))


def _to_validate(targets: Sequence[Target], training: IntArray, held_out: IntArray) -> list[Target]:
    """Remove labels that no training cell has; warn or raise if that leaves no cells to validate a head.

    Cells are held out by the first column of labels, or by group. All cells with a label in another column may
    therefore be training cells.
    """
    known = [_without_unseen(target, training, held_out) for target in targets]
    missed = [target.key for target in known if len(held_out) and not target.is_there[held_out].any()]
    if len(missed) == len(known):
        lost = next(target for target in targets if target.is_there[held_out].any())
        first = lost.names(lost.column[held_out[lost.is_there[held_out]]])[0]
        raise ValueError(
            f"Expected validation cells with labels that training cells have too, but the training cells have none of "
            f"the labels of the validation cells in obs[{lost.key!r}] (first: {first!r}). Hold out other cells or "
            "groups."
        )
    if missed:
        warn(
            f"None of the {len(held_out)} validation cells has a label or value to validate in {listed(missed)} of "
            "obs. These heads are neither validated nor calibrated. To hold out cells that have one, pass a column of "
            "obs as validation=."
        )
    return known


def _without_unseen(target: Target, training: IntArray, held_out: IntArray) -> Target:
    """Remove validation labels that no training cell has, because no model can predict them."""
    if target.classes is None:
        return target
    unseen = np.flatnonzero((target.counts(training) == 0) & (target.counts(held_out) > 0))
    if not len(unseen):
        return target
    asked = held_out[target.is_there[held_out]]
    lost = asked[np.isin(target.column[asked], unseen)]
    if len(lost) < len(asked):  # If none remain, the caller warns or raises for all columns together.
        warn(
            f"Labels of obs[{target.key!r}] are among the validation cells but not among the training cells: "
            f"{listed(target.classes[i] for i in unseen)}. The {len(lost)} of {len(asked)} validation cells with such "
            "labels are not used. Hold out other cells or groups to use them.",
            DataWarning,
        )
    column = target.column.copy()
    column[lost] = -1
    return replace(target, column=column)


def _set_heads(model: CellModel, specs: Sequence[HeadSpec], reads: HeadSetting, seed: int) -> None:
    """Replace the heads of the model by new ones, initialised from the seed."""
    if reads != "published" and model.head_pooling is None:
        raise ValueError(
            f"Expected head_reads='published', got {reads!r}. {model.family} has no other heads than those of its "
            "published checkpoints. Leave head_reads out."
        )
    if model.head_specs:
        log.info("replacing the heads on %s by new ones", ", ".join(repr(spec.key) for spec in model.head_specs))
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # seeds only the CPU, not GPUs
        if reads == "published":
            model.set_heads(specs)
        else:
            # With these weights, heads on the inputs generalise best to new groups (docs/study.md).
            pooling = "ranked" if reads == "inputs" else model.head_pooling
            model.set_heads(replace(spec, pooling=pooling, reads=reads) for spec in specs)


def _weights(
    source: CellSource,
    targets: Sequence[Target],
    training: IntArray,
    group_weights: Mapping[str, Any] | None,
    *,
    upsample: bool,
) -> FloatArray | None:
    """Return the weights of training cells; ``None`` if each is read once an epoch."""
    if not upsample:
        return mixture(source, group_weights, training)
    if group_weights is not None:
        raise TypeError(
            "Expected upsample=True or group_weights in config, got both, which each say how often cells are drawn. "
            "Leave one out."
        )
    return _balancing(targets, training)


def _balancing(targets: Sequence[Target], training: IntArray) -> FloatArray:
    """Compute the probability of drawing each training cell, so that labels are drawn equally often."""
    target = next((one for one in targets if one.classes is not None), None)
    if target is None:
        raise TypeError(f"upsample=True needs labels, but obs[{targets[0].key!r}] holds values. Leave it out.")
    codes, counts = target.column[training], target.counts(training)
    weights = np.where(codes >= 0, 1 / np.maximum(counts[codes], 1), np.nan)
    weights[codes < 0] = np.nanmean(weights)  # cells with a label only for another head
    return weights / weights.sum()


def _class_weights(
    given: Literal["balanced"] | Mapping[str, float] | None, targets: Sequence[Target], training: IntArray
) -> dict[str, tuple[float, ...]]:
    """Return the class weights of each column of labels."""
    if given is None:
        return {}
    if given != "balanced" and not isinstance(given, Mapping):
        raise ValueError(
            f"Expected class_weight to be 'balanced' or a mapping of labels to weights, got {given!r}. Pass either."
        )
    labelled = [target for target in targets if target.classes is not None]
    if not labelled:
        raise TypeError(f"class_weight needs labels, but obs[{targets[0].key!r}] holds values. Leave it out.")
    given = given if isinstance(given, str) else {str(name): weight for name, weight in given.items()}
    if isinstance(given, Mapping):
        check_class_weight(given, labelled)
    return {target.key: _weights_of(given, target, training) for target in labelled}


def check_class_weight(given: Mapping[str, float], labelled: Sequence[Target]) -> None:
    """Raise if ``class_weight`` names a label that no column holds."""
    known = {name for target in labelled for name in target.classes or ()}
    unknown = sorted({str(name) for name in given} - known)
    if unknown:
        where = " or ".join(f"obs[{target.key!r}]" for target in labelled)
        raise missing_key(unknown[0], sorted(known), f"a label of {where}", "Correct class_weight.")


def _weights_of(
    given: Literal["balanced"] | Mapping[str, float], target: Target, training: IntArray
) -> tuple[float, ...]:
    """Return the weight of each class of one column."""
    assert target.classes is not None
    if not isinstance(given, Mapping):
        counts = target.counts(training)
        n_seen = (counts > 0).sum()  # labels that no training cell has get weight 0
        return tuple(np.where(counts > 0, counts.sum() / (n_seen * np.maximum(counts, 1)), 0).tolist())
    for name, weight in given.items():
        if not (isinstance(weight, Real) and 0 <= weight < np.inf):
            raise ValueError(
                f"Expected class_weight of {name!r} to be a number of at least 0, got {weight!r}. Labels that "
                "class_weight does not name have weight 1."
            )
    return tuple(float(given.get(name, 1.0)) for name in target.classes)
