"""Pretrain a model without labels."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from anndata import AnnData
from torch import nn

from scllm import models
from scllm._checks import check_adata
from scllm._results import match_settings
from scllm.data import genes
from scllm.data.cells import CellSource
from scllm.data.encode import RankEncoder
from scllm.data.medians import token_medians
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.config import Precision, TrainConfig
from scllm.engine.objectives import Objective, objective_from_dict
from scllm.engine.spec import Cells
from scllm.models.base import CellModel
from scllm.models.config import Recipe
from scllm.tl._inputs import check_layer, take_medians
from scllm.tl._model import ModelLike, resolve
from scllm.tl._parts import divide, mixture
from scllm.tl._train import Data, Training, check_config, merged_config, processes, train

__all__ = ["prepare", "pretrain"]


@closes_files
def pretrain(
    data: Data,
    model: ModelLike = "scgpt",
    *,
    size: str = "base",
    n_gpus: int | None = None,
    n_procs: int | None = None,
    device: str = "auto",
    run_dir: str | PathLike[str] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    mask_ratio: float | Sequence[float] | None = None,
    left_out: float | None = None,
    dropout: float | None = None,
    validation: float | str = 0.03,
    group_key: str | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    precision: Precision = "auto",
    resume: Literal["auto"] | bool = "auto",
    config: TrainConfig | None = None,
    random_state: int = 0,
) -> CellModel:
    """Train a model on cells without labels, from random weights or from an existing model.

    The objective depends on the family:

    - scgpt masks the expression of a fraction of each cell's genes. It predicts the masked values twice: from the other
      genes, and from the cell embedding only (Cui et al. 2024, doi:10.1038/s41592-024-02201-0). New models also learn
      which cells are alike, whatever their sequencing depth (``relational`` of :class:`scllm.tl.TrainConfig`).
    - geneformer masks genes in each cell's ranking and predicts which genes they are (Theodoris et al. 2023,
      doi:10.1038/s41586-023-06139-9).
    - scbert masks expression levels and classifies them.
    - scfoundation predicts masked genes, including zeros, at the depth that a cell had before count downsampling.
    - gpt2, albert and xlnet predict genes in the order of their expression. Their loss is in nats per gene, see
      :func:`scllm.tl.perplexity`.

    Everything is written to a run directory. After a crash, the same call resumes the run and gives the same loss
    curve.

    Parameters
    ----------
    data
        An AnnData, which may be backed; a path to ``.h5ad`` or ``.zarr``; a TileDB-SOMA or its address; a collection
        of annbatch; or a list or a folder of these. For geneformer also a folder of ranked token sequences, as written
        by ``scllm genecorpus``.
    model
        Name of a family to train from random weights, or a model (or its path) to start from. That model is not
        changed, and its heads are not kept.
    size
        Named architecture of a new model: ``"tiny"``, ``"small"``, ``"base"``, or a published one of the family.
    n_gpus
        Number of GPUs, with one process each. ``None``: all available GPUs, or else one CPU process.
    n_procs
        Number of CPU processes, with ``device="cpu"``.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    run_dir
        Directory in which the run is written and resumed. ``None``: a new one under ``scllm.settings.run_dir``.
    epochs
        Passes over the cells. ``None``: the default of the family (scgpt, geneformer: 6). New scgpt models of size
        ``"tiny"`` and ``"small"`` are trained for more epochs if 6 of them are fewer than 500 steps.
    batch_size
        Cells per optimiser step, over all processes (scgpt, geneformer: 32; new scgpt models of size ``"tiny"`` and
        ``"small"``: 64).
    lr
        Peak learning rate (scgpt: 1e-4, but 3e-3 for new ``"tiny"`` and 1e-3 for new ``"small"`` models; geneformer:
        1e-3).
    mask_ratio
        Fraction of a cell's genes to mask, or several fractions, one of which is drawn at each step (scgpt: 0.25, 0.5,
        0.75; geneformer: 0.15).
    left_out
        Fraction of a cell's genes held out of the input. From the cell embedding, the model predicts for these genes
        and for genes without expression whether they are expressed. The embedding then separates cell types better.
        ``None``: the default of the family (scgpt: 0).
    dropout
        Dropout of the blocks (scgpt: 0.2, but 0 for new ``"tiny"`` and ``"small"`` models; geneformer: 0.02). With 0,
        any number of processes gives the same loss curve.
    validation
        Fraction of cells held out, or a column of ``obs`` with ``train`` and ``validation``, as written by
        :func:`scllm.pp.split`.
    group_key
        Column of groups (donors) that are held out whole for validation.
    layer
        Layer to read. ``None``: ``X``. scgpt reads counts, normalised or log-normalised values (their bins are the
        same), geneformer counts.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: the one of an earlier
        :func:`scllm.pp.match_genes`, or else the one that matches best.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: the one of an earlier
        :func:`scllm.pp.match_genes`, or else 0.3.
    precision
        ``"auto"``: fp32 on a CPU, bf16 on a GPU that supports it.
    resume
        ``"auto"`` resumes a run with the same settings in ``run_dir``, if there is one, and returns the model of a
        finished run at once. ``True`` requires such a run, ``False`` requires an empty directory.
    config
        Further settings, see :class:`scllm.tl.TrainConfig`. Passing a value both ways is a ``TypeError``.
    random_state
        Seed for weight initialisation, data order, masking and dropout.

    Returns
    -------
    The trained model with the weights of the best validation loss, and its ``history``.

    Writes
    ------
    ``adata.uns["scllm"]["pretrain"]``
        Settings, and the history as ``table``, thinned to 2,000 rows if it is longer. ``history`` of the model has all
        rows.
    ``adata.uns["scllm"]["model"]``
        Path, family and hash of the model.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> model = scllm.tl.pretrain(adata, size="tiny", epochs=1)  # doctest: +SKIP
    """
    prepared = prepare(
        data,
        model,
        size=size,
        n_gpus=n_gpus,
        n_procs=n_procs,
        device=device,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        mask_ratio=mask_ratio,
        left_out=left_out,
        dropout=dropout,
        validation=validation,
        group_key=group_key,
        layer=layer,
        gene_key=gene_key,
        min_coverage=min_coverage,
        precision=precision,
        config=config,
        random_state=random_state,
    )
    set_medians(prepared)
    return train(prepared, run_dir=run_dir, resume=resume)


def prepare(
    data: Data,
    model: ModelLike,
    *,
    size: str,
    n_gpus: int | None,
    n_procs: int | None,
    device: str,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    mask_ratio: float | Sequence[float] | None,
    left_out: float | None,
    dropout: float | None,
    validation: float | str,
    group_key: str | None,
    layer: str | None,
    gene_key: str | None,
    min_coverage: float | None,
    precision: Precision,
    config: TrainConfig | None,
    random_state: int,
) -> Training:
    """Check the arguments of :func:`pretrain` and fill in the defaults."""
    if isinstance(data, AnnData):
        check_adata(data)
    check_config(config)
    config = config or TrainConfig()
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"Expected dropout of at least 0 and below 1, got {dropout}. For example, scGPT uses 0.2.")
    TrainConfig(random_state=random_state)  # raises on an invalid seed before weights are drawn
    source = open_source(data, layer=layer)
    matching = match_settings(data, gene_key, min_coverage)
    where = processes(n_gpus, n_procs, device)
    genes.check_unique(source.genes)
    seed = random_state or config.random_state or 0
    is_new = isinstance(model, str) and _is_family(model)
    recipe = _recipe(model, size) if is_new and config.relational is not False else Recipe()
    begun = _starting_model(data, _names(source, matching["gene_key"]), model, size, recipe, dropout, seed)
    was_relational = begun.history is not None and "relational" in begun.history
    begun.history, begun.comparison, begun.path = None, None, None
    take_medians(source, begun)
    check_layer(source, begun, layer, data, downsample=config.downsample or 0.0)
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    defaults = {
        # trained gene embeddings are not initialised again, unless config asks for it
        "gene_init": "svd" if is_new else "random",
        "max_len": models.training_length(begun.family, begun.config),
        # the history of a fine-tuned model does not say how it was pretrained, but its pooled skip does
        "relational": was_relational or getattr(begun.config, "pooled_skip", False),
        **models.family_module(begun.family).PRETRAIN,
        **recipe.training,
    }
    training, held_out = divide(source, validation, group_key=group_key, random_state=seed)
    settings = merged_config(config, given, defaults, precision=precision, random_state=random_state)
    if epochs is None and config.epochs is None:
        settings = settings.at_least(recipe.n_steps, len(training))
    if config.warmup is None:
        # a short training would otherwise end before the learning rate has reached its peak
        settings = replace(settings, warmup=min(settings.warmup, settings.n_steps(len(training)) // 10))
    objective = _objective(begun, settings.random_state, mask_ratio, left_out)
    params = {"size": size, "dropout": dropout, "validation": validation, "group_key": group_key, "layer": layer}
    cells = Cells(training, held_out, weights=mixture(source, settings.group_weights, training))
    return Training("pretrain", data, source, matching, begun, objective, settings, cells, where, params)


def _recipe(family: Any, size: str) -> Recipe:
    """Return how new models of a size are pretrained; an empty recipe if that is as the family says."""
    return getattr(models.family_module(family), "RECIPES", {}).get(size, Recipe())


def set_medians(prepared: Training) -> None:
    """Give an encoder of ranks that has no medians those of the training cells, which reads all of them."""
    encoder = prepared.model.encoder
    if isinstance(encoder, RankEncoder) and encoder.medians is None:
        cells, n_tokens = prepared.cells.train, len(prepared.model.vocab)
        medians = token_medians(prepared.source, prepared.match, cells, n_tokens)
        prepared.model.encoder = replace(encoder, medians=medians)


def _names(source: CellSource, gene_key: str | None) -> list[str]:
    """Return the gene names for the vocabulary of a new model."""
    (named,) = genes.name_columns(source.genes, source.var, gene_key or "var_names").values()
    # Versions of one gene share a token.
    return list(dict.fromkeys(name for name in genes.strip_version(named) if name))


def _starting_model(
    data: Data,
    names: list[str],
    model: ModelLike,
    size: str,
    recipe: Recipe,
    dropout: float | None,
    random_state: int,
) -> CellModel:
    """Build a new model if ``model`` names a family; copy the model otherwise."""
    if isinstance(model, str) and _is_family(model):
        config = {**recipe.model, **({} if dropout is None else {"dropout": dropout})}
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(random_state)  # seeds only the CPU, not GPUs
            return models.build(model, vocab=names, size=size, **config)
    if isinstance(model, str) and not model.startswith("hf://") and "/" not in model and not Path(model).exists():
        close = difflib.get_close_matches(model.lower(), models.families(), n=1)
        seen = ", which is neither an existing path nor a module that can be imported" if "." in model else ""
        raise ValueError(
            f"Expected model to be one of {models.families()}, the path of a model, or the module of a family from "
            f"another package, got {model!r}{seen}. "
            + (f"Did you mean {close[0]!r}?" if close else "Check the spelling and the working directory.")
        )
    begun = copy.deepcopy(resolve(model, data if isinstance(data, AnnData) else None)).cpu()
    begun.set_heads(())  # after pretraining, the heads would get embeddings that they were not trained on
    if dropout is not None:
        begun.config = replace(begun.config, dropout=dropout)
        if begun.config.dropout != dropout:
            raise TypeError(
                f"Expected the dropout of the model's hf_config, {begun.config.dropout}, got dropout={dropout}. Leave "
                "it out, or build the model from a configuration with that dropout."
            )
        for module in begun.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
    return begun


def _objective(
    model: CellModel, seed: int | None, mask_ratio: float | Sequence[float] | None, left_out: float | None
) -> Objective:
    """Return the objective of the family, with the settings that were passed."""
    settings: dict[str, Any] = model.config.objective()
    objective = objective_from_dict(settings, model.family)
    known = {field.name for field in fields(objective)}
    if mask_ratio is not None:
        shares = (float(mask_ratio),) if isinstance(mask_ratio, Real) else tuple(mask_ratio)
        # Objectives with a single share of genes to mask call it p; those that draw from several call it mask_ratio.
        settings |= {"p": shares[0]} if "p" in known and len(shares) == 1 else {"mask_ratio": shares}
    if left_out is not None:
        settings["left_out"] = left_out
    if "seed" in known:
        settings["seed"] = seed
    surplus = sorted(set(settings) - known - {"kind"})
    if surplus:
        raise TypeError(
            f"{surplus[0]}={settings[surplus[0]]!r} cannot be used with {model.family}. Its objective is "
            f"{settings['kind']}, with the settings {sorted(known - {'seed'})}. Leave it out."
        )
    return objective_from_dict(settings, model.family)


def _is_family(name: str) -> bool:
    """Return whether a string names a family, possibly the module of another package, and not a path."""
    if name in models.families():
        return True
    return "." in name and "/" not in name and not Path(name).exists() and _is_module(name)


def _is_module(name: str) -> bool:
    """Return whether a module of that name exists; raise if its package fails to import another module."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return False
        raise
    except (ImportError, ValueError):  # the name has dots where module names cannot
        return False
