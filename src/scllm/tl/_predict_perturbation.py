"""Predict expression after a perturbation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata, missing_key
from scllm._log import warn
from scllm._results import free_key, record, record_keys
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.config import Precision
from scllm.models.base import CellModel
from scllm.tl._compounds import Covariate, read_compounds
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve
from scllm.tl._perturbation_model import agreement, predicted_values
from scllm.tl._perturbed_cells import log_normalised
from scllm.tl._perturbed_genes import JOIN

__all__ = ["predict_perturbation"]


@closes_files
def predict_perturbation(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    genes: str | Sequence[str | Sequence[str]],
    covariate: Covariate | None = None,
    dose: float | None = None,
    min_confidence: float | None = None,
    truth: AnnData | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    key_added: str = _keys.PREDICTED,
    copy: bool = False,
) -> AnnData | None:
    """Predict the expression of each cell after a perturbation.

    Parameters
    ----------
    adata
        Cells before the perturbation, such as control cells, with counts.
    model
        A model from :func:`fit_perturbation`, or its path. ``None``: the model last recorded on ``adata``.
    genes
        What is perturbed: a gene, or genes together as ``"A+B"`` or a list in the list; for a model of compounds the
        name of a compound. Several are predicted one after the other.
    covariate
        SMILES or vectors of compounds that the model was not trained on, as in :func:`fit_perturbation`.
    dose
        Dose of the compound, for models trained with ``dose_key``.
    min_confidence
        Do not predict if the decoders of the model agree less than this, from 0 to 1. The ``abstention`` of
        ``uns["scllm"]["perturbation"]`` says what that gains.
    truth
        Cells that were perturbed so, with the same genes as ``adata``, to compare the mean change with.
    layer
        Layer with counts. ``None``: ``X``.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: as in :func:`embed`.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: as in :func:`embed`.
    batch_size
        Number of cells per forward pass; changes only speed and memory.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    precision
        ``"auto"``: fp32 on a CPU, bf16 on a GPU that supports it.
    key_added
        Layer to write; several perturbations append ``_<name>``.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.layers[key_added]``
        Predicted ``log1p`` of counts per 10,000, float32 ``(n_cells, n_genes)``, dense. NaN for genes that the model
        does not read, and everywhere if it is less confident than ``min_confidence``.
    ``adata.uns["scllm"]["predict_perturbation"]``
        ``params``; ``table`` with the ``confidence`` of each perturbation and whether it was ``predicted``; ``changes``
        with the mean predicted ``change`` of each gene and, with ``truth``, the ``measured`` one.

    Examples
    --------
    >>> scllm.tl.predict_perturbation(controls, model, genes="STAT1")  # doctest: +SKIP
    """
    check_adata(adata, copy, key_added)
    chosen = resolve(model, adata)
    _check_model(chosen, min_confidence)
    source = open_source(adata, layer=layer)
    check_layer(source, chosen, layer, adata)
    match = gene_match(adata, source, chosen, gene_key, min_coverage)
    asked = _asked(genes, chosen, source.genes, match, covariate, dose)
    measured = None if truth is None else _measured(truth, source, match, layer, len(asked))
    names = [one.name for one in asked]
    layers = [key_added] if len(asked) == 1 else [f"{key_added}_{name}" for name in names]
    keys = [free_key(adata, "layers", name) for name in layers]
    columns = match.of_genes(source.genes, adata.var_names)
    place = np.where(columns >= 0, np.searchsorted(match.measured, columns), -1)
    adata = adata.copy() if copy else adata
    table, changed, results = [], [], {}
    for one, key in zip(asked, keys, strict=True):
        values = np.full(adata.shape, np.nan, np.float32)
        total = np.zeros((chosen.config.n_decoders, len(match.measured)))  # type: ignore[attr-defined]
        parts = predicted_values(
            chosen, source, match, np.arange(source.n_obs), one.tokens, one.vector, batch_size=batch_size,
            device=device, precision=precision,
        )  # fmt: skip
        for rows, found in parts:
            values[rows, place >= 0] = found[1:].mean(0).numpy()[:, place[place >= 0]]
            total += (found[1:] - found[0]).double().sum(1).numpy()
        confidence = agreement(total / source.n_obs)
        is_sure = min_confidence is None or confidence >= min_confidence
        results[key] = values if is_sure else np.full_like(values, np.nan)
        table.append({"perturbation": one.name, "confidence": confidence, "predicted": is_sure})
        change = (total.mean(0) / source.n_obs)[place[place >= 0]]
        rows_of = {"perturbation": one.name, "gene": adata.var_names[place >= 0].astype(str), "change": change}
        if measured is not None:
            rows_of["measured"] = measured[place[place >= 0]]
        changed.append(pd.DataFrame(rows_of))
    for old in record_keys(adata, "layers", layers, call=key_added):
        adata.layers.pop(old, None)
    for key, values in results.items():
        adata.layers[key] = values
    unsure = [row["perturbation"] for row in table if not row["predicted"]]
    if unsure:
        warn(
            f"The model is less confident than min_confidence={min_confidence} of {unsure}, which are not predicted: "
            "the layer is NaN. Lower min_confidence to see what it would predict."
        )
    params = {"genes": names, "dose": dose, "min_confidence": min_confidence, "layer": layer, "key_added": key_added}
    record(adata, "predict_perturbation", params, pd.DataFrame(table), changes=pd.concat(changed, ignore_index=True))
    remember(adata, chosen)
    return adata if copy else None


def _measured(truth: AnnData, source: CellSource, match: GeneMatch, layer: str | None, n_asked: int) -> FloatArray:
    """Return the mean change of each measured gene between the cells to predict from and perturbed cells."""
    if n_asked != 1:
        raise TypeError(f"Expected one perturbation in genes with truth=, got {n_asked}. Pass one at a time.")
    perturbed = open_source(truth, layer=layer)
    if not perturbed.genes.equals(source.genes):
        raise ValueError("Expected truth to have the genes of adata in the same order, got others. Subset both alike.")
    means = [log_normalised(one, match, np.arange(one.n_obs)).mean(0) for one in (source, perturbed)]
    return np.asarray(means[1] - means[0]).ravel()


@dataclass(frozen=True)
class _Asked:
    """A perturbation to predict."""

    name: str
    tokens: tuple[int, ...]
    vector: FloatArray | None


def _check_model(model: CellModel, min_confidence: float | None) -> None:
    """Raise on a model that predicts no perturbations."""
    if not getattr(model.config, "perturbed", ()):
        raise ValueError(
            f"Expected a model from tl.fit_perturbation, got a {model.family} model without perturbation flags. Train "
            "one with tl.fit_perturbation."
        )
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise ValueError(f"Expected min_confidence from 0 to 1, got {min_confidence}. Leave it out to predict always.")
    if min_confidence is not None and model.config.n_decoders < 2:  # type: ignore[attr-defined]
        raise ValueError(
            "Expected a model with several decoders for min_confidence, got one with 1, which gives no confidence. "
            "Train with n_decoders=5."
        )


def _asked(
    genes: str | Sequence[str | Sequence[str]],
    model: CellModel,
    measured: pd.Index,
    match: GeneMatch,
    covariate: Covariate | None,
    dose: float | None,
) -> list[_Asked]:
    """Find what is asked for: tokens of genes, or vectors of compounds."""
    items = [genes] if isinstance(genes, str) else list(genes)
    names = [item if isinstance(item, str) else JOIN.join(item) for item in items]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Expected one or several different perturbations in genes, got {names}. Name each once.")
    if model.config.n_covariates:  # type: ignore[attr-defined]
        return [_Asked(name, (), _vector(model, name, covariate, dose)) for name in names]
    if covariate is not None or dose is not None:
        raise TypeError("covariate= and dose= are for models of compounds, but this one is of genes. Leave them out.")
    found = []
    for name in names:
        parts = name.split(JOIN)
        tokens: IntArray = match.of_genes(measured, pd.Index(parts))
        if (tokens < 0).any():
            lacking = parts[int(np.flatnonzero(tokens < 0)[0])]
            raise missing_key(lacking, measured, "a gene of the data that the model knows")
        found.append(_Asked(name, tuple(tokens.tolist()), None))
    return found


def _vector(model: CellModel, name: str, covariate: Covariate | None, dose: float | None) -> FloatArray:
    """Return the vector of a compound: the one passed, or the one that the model was trained on."""
    n = model.config.n_covariates  # type: ignore[attr-defined]
    known = list(model.config.perturbed)  # type: ignore[attr-defined]
    if covariate is not None:
        vector = read_compounds(covariate, [name]).vectors[0]
        if dose is not None:
            vector = np.append(vector, np.log1p(dose))
    elif name in known:
        vector = model.covariates[known.index(name)].cpu().numpy().copy()
        if dose is not None:
            vector[-1] = np.log1p(dose)
    else:
        raise missing_key(name, known, "a compound that the model was trained on", "Pass its structure as covariate=.")
    if len(vector) != n:
        raise ValueError(
            f"Expected a vector of {n} numbers for {name!r}, got {len(vector)}. Pass dose= if the model was trained "
            "with dose_key, and vectors of the same kind."
        )
    return torch.as_tensor(vector).float().numpy()
