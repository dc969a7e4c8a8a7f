"""Train a model to predict expression after perturbations, and score it beside simple baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from scllm._checks import check_adata, missing_key, obs_column
from scllm._log import DataWarning, log, warn
from scllm._names import listed
from scllm._results import match_settings, record
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.encode import ValueEncoder
from scllm.data.genes import GeneMatch
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.config import Precision, TrainConfig
from scllm.engine.objectives import PerturbedExpression
from scllm.engine.optim import Freeze, check_freeze
from scllm.engine.spec import Cells
from scllm.models.base import CellModel
from scllm.tl._compounds import Compounds, Covariate, read_compounds
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, copy_to_train, gene_match, resolve
from scllm.tl._perturbation_baselines import MEAN, Task, baselines
from scllm.tl._perturbation_model import agreement, decoder_changes, perturbation_model
from scllm.tl._perturbation_scores import REPLICATE, Scores, abstention, score
from scllm.tl._perturbed_cells import Screen, changes, log_normalised, read_screen
from scllm.tl._train import Training, check_config, merged_config, processes, train

__all__ = ["fit_perturbation"]

MODEL = "model"
# cells of which the predicted change of a perturbation is the mean
_MOST_CELLS = 200
# settings of the original; its learning rate is for its width
_DEFAULTS = {"epochs": 15, "batch_size": 64, "schedule": "step", "warmup": 0, "use_dropout": False}
_LR, _WIDTH = 1e-4, 512


@closes_files
def fit_perturbation(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    key: str,
    control: str,
    batch_key: str | None = None,
    covariate: Covariate | None = None,
    dose_key: str | None = None,
    held_out: float | Sequence[str] = 0.2,
    n_decoders: int = 5,
    freeze: Freeze = 0,
    validation: float = 0.1,
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
    """Train a model to predict expression after perturbations that it has not seen.

    The model is scGPT's perturbation model (Cui et al. 2024, doi:10.1038/s41592-024-02201-0): it reads all genes of a
    control cell with a flag at those that are perturbed, and predicts each gene of a perturbed cell as an affine
    function of its value. Some perturbations are held out, and the model is scored on them beside simple baselines and
    the agreement of replicates, because on most data a mean or a linear model is as good as published models
    (Ahlmann-Eltze et al. 2025, doi:10.1038/s41592-025-02772-6).

    Parameters
    ----------
    adata
        Cells by genes, with counts.
    model
        A scgpt model to start from, or its path; it is not changed. ``None``: the one last recorded on ``adata``.
    key
        Column of ``obs`` with the perturbation of each cell: a gene, genes joined by ``+``, or with ``covariate`` a
        compound.
    control
        Label of control cells in ``obs[key]``.
    batch_key
        Column of ``obs`` with batches. Perturbed cells are compared, and paired in training, with control cells of the
        same batch.
    covariate
        For compounds: a mapping (or Series) from names to SMILES, of which fingerprints are computed (needs rdkit), or
        a mapping (or DataFrame) from names to vectors. ``None``: perturbations are genes.
    dose_key
        Column of ``obs`` with the dose of the compound of each cell.
    held_out
        Fraction of the perturbations that are held out of training and scored, or their names. Compounds with known
        structures are held out by scaffold.
    n_decoders
        Number of decoders of the ensemble. Each is trained without another part of the perturbations, and their
        agreement is the confidence of a prediction.
    freeze
        Weights that are not trained: those of the first n blocks, ``"encoder"`` is not possible here, a pattern of
        weight names, or a list of patterns.
    validation
        Fraction of the cells of training perturbations and controls that decides which weights are best. Held-out
        perturbations do not.
    layer
        Layer with counts. ``None``: ``X``.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: as in :func:`finetune`.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: as in :func:`finetune`.
    epochs
        Passes over the cells (15).
    batch_size
        Cells per optimiser step, over all processes (64).
    lr
        Learning rate, which decreases by 10 % each epoch. ``None``: 1e-4 for a model of width 512, and higher for
        narrower ones in inverse proportion.
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
        As in :func:`finetune`.
    config
        Further settings, see :class:`scllm.tl.TrainConfig`.
    random_state
        Seed for held-out perturbations, pairs of cells, validation and data order.

    Returns
    -------
    The trained model, for :func:`predict_perturbation`.

    Writes
    ------
    ``adata.uns["scllm"]["perturbation"]``
        ``params`` and:

        - ``table``: ``score`` of each held-out ``perturbation``, ``method`` and ``metric``
          (:func:`scllm.metrics.perturbation_scores`). All methods are scored against one half of the perturbation's
          cells; ``replicate`` is the other half. Means over 20 random halves. ``scaled`` is 0 for the mean baseline and
          1 for the replicate, and missing where these differ by less than the error of the difference.
        - ``summary``: means over perturbations with 95 % bootstrap intervals, ``n``, and ``n_unscaled``, the number of
          perturbations without a scaled score; ``among`` all, or those whose genes are measured.
        - ``confidence``: agreement of the decoders for each held-out perturbation.
        - ``abstention``: mean score of the model over its most confident predictions.
        - ``split``: whether each perturbation was held out, and whether its genes are measured.
    ``adata.uns["scllm"]["fit_perturbation"]``
        Settings, and the history as ``table``.
    ``adata.uns["scllm"]["model"]``
        Path, family and hash of the model.

    Examples
    --------
    >>> model = scllm.tl.fit_perturbation(adata, pretrained, key="target", control="NT")  # doctest: +SKIP
    """
    check_adata(adata)
    check_config(config)
    screen = read_screen(adata, key, control, batch_key)
    start = resolve(model, adata)
    _check_start(start, n_decoders, freeze)
    compounds = None if covariate is None else read_compounds(covariate, screen.names)
    doses = _doses(adata, dose_key, compounds, screen)
    source = open_source(adata, layer=layer)
    where = processes(n_gpus, n_procs, device)
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    lr_of_width = _LR * _WIDTH / start.config.d_model
    defaults = {**_DEFAULTS, "lr": lr_of_width, "gene_init": "random", "head_reads": "published"}
    settings = merged_config(config, given, defaults, precision=precision, random_state=random_state)
    begun = _reading_values(copy_to_train(start))
    check_layer(source, begun, layer, adata)
    match = gene_match(adata, source, begun, gene_key, min_coverage)
    task = _Task.of(screen, source, match, compounds, held_out, settings.random_state)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(settings.random_state)
        begun = perturbation_model(begun, [screen.names[p] for p in task.learnt], task.vectors(doses), n_decoders)
    cells = _cells(task, doses, validation, settings.random_state)
    objective = PerturbedExpression(genes=[task.tokens[p] for p in task.learnt], seed=settings.random_state)
    params = {"key": key, "control": control, "batch_key": batch_key, "dose_key": dose_key, "layer": layer}
    params |= {"held_out": [screen.names[p] for p in task.held_out], "n_decoders": n_decoders, "validation": validation}
    matching = match_settings(adata, gene_key, min_coverage)
    prepared = Training(
        "fit_perturbation", adata, source, matching, begun, objective, settings, cells, where, params,
        check_freeze(begun, freeze),
    )  # fmt: skip
    trained = train(prepared, run_dir=run_dir, resume=resume)
    _record(adata, task, trained, start, doses, params, settings.random_state, where.device)
    return trained


def _check_start(model: CellModel, n_decoders: int, freeze: Freeze) -> None:
    """Raise on a model that cannot be trained so."""
    if model.family != "scgpt":
        raise ValueError(
            f"Expected a scgpt model, which reads the values of all genes and flags of perturbed genes, got a "
            f"{model.family} model. Pretrain 'scgpt'; tl.perturb takes every family."
        )
    if getattr(model.config, "value_style", "") != "continuous":
        raise ValueError(
            f"Expected a scgpt model with value_style='continuous', got {model.config.value_style!r}. Pretrain one."  # type: ignore[attr-defined]
        )
    if n_decoders < 1:
        raise ValueError(f"Expected n_decoders of at least 1, got {n_decoders}. Pass 5, or 1 for the original model.")
    if freeze == "encoder":
        raise ValueError("Expected other weights to freeze than 'encoder', because the model has no heads. Pass 0.")


def _reading_values(model: CellModel) -> CellModel:
    """Let a model read log-normalised values of all measured genes, as the original does here."""
    model.encoder = ValueEncoder(max_len=len(model.vocab) + 1, include_zeros=True)
    return model


def _doses(adata: AnnData, dose_key: str | None, compounds: Compounds | None, screen: Screen) -> FloatArray | None:
    if dose_key is None:
        return None
    if compounds is None:
        raise TypeError(f"dose_key={dose_key!r} is for compounds. Pass their vectors as covariate=.")
    column = pd.to_numeric(obs_column(adata.obs, dose_key), errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero((screen.code >= 0) & ~(column >= 0))
    if len(bad):
        raise ValueError(
            f"Expected a dose of at least 0 for every treated cell in obs[{dose_key!r}], got {column[bad[0]]} in cell "
            f"{adata.obs_names[bad[0]]!r}. Correct it."
        )
    return column


@dataclass(frozen=True)
class _Task:
    """A screen with its split, on the genes that the model reads."""

    screen: Screen
    source: CellSource
    match: GeneMatch
    compounds: Compounds | None
    names: list[str]
    tokens: list[tuple[int, ...]]
    held_out: IntArray
    learnt: IntArray

    @classmethod
    def of(
        cls,
        screen: Screen,
        source: CellSource,
        match: GeneMatch,
        compounds: Compounds | None,
        held_out: float | Sequence[str],
        seed: int,
    ) -> _Task:
        """Split perturbations, and find which of them a model can read."""
        place = {str(name): int(token) for name, token in zip(source.genes, match.token_ids, strict=True)}
        tokens: list[tuple[int, ...]] = [() for _ in screen.names]
        if compounds is None:
            found = [tuple(place.get(gene, -1) for gene in genes) for genes in screen.genes]
            tokens = [of if min(of) >= 0 else () for of in found]
        is_known = np.array([compounds is not None or bool(of) for of in tokens])
        tested = _held_out(screen, compounds, held_out, seed)
        learnt = np.flatnonzero(is_known & ~np.isin(np.arange(len(tokens)), tested))
        if not len(learnt):
            raise ValueError(
                f"Expected training perturbations of measured genes in obs[{screen.key!r}], got none: no label is a "
                f"gene of the data that the model knows (first: {screen.names[0]!r}). Name perturbations by genes as "
                "they are in adata.var_names, or pass covariate= for compounds."
            )
        if not is_known[tested].any():
            raise ValueError(
                f"Expected a held-out perturbation of measured genes to score the model on, got none in "
                f"{listed(screen.names[p] for p in tested)}. Hold out others (combinations are joined by '+')."
            )
        unknown = [screen.names[p] for p in np.flatnonzero(~is_known)]
        if unknown:
            warn(
                f"{len(unknown)} of {len(tokens)} perturbations are of genes that are not measured or not in the "
                f"model's vocabulary ({listed(unknown)}). The model neither learns nor predicts them; the baselines "
                "'mean' and 'no change' do.",
                DataWarning,
            )
        names = dict.fromkeys(match.measured.tolist(), "")
        for name, token in place.items():
            names[token] = names.get(token) or name
        return cls(screen, source, match, compounds, [names[t] for t in match.measured], tokens, tested, learnt)

    @property
    def trained(self) -> IntArray:
        """Perturbations that are not held out; baselines also use those whose genes are not measured."""
        return np.setdiff1d(np.arange(len(self.tokens)), self.held_out)

    def vectors(self, doses: FloatArray | None) -> FloatArray | None:
        """Return the vectors of the compounds that the model learns, with a place for the dose."""
        if self.compounds is None:
            return None
        found = self.compounds.vectors[self.learnt]
        return found if doses is None else np.pad(found, ((0, 0), (0, 1)))


def _held_out(
    screen: Screen, compounds: Compounds | None, held_out: float | Sequence[str], seed: int
) -> NDArray[np.int64]:
    """Choose the perturbations to hold out: those named, or a fraction, by scaffold if structures are known."""
    n = len(screen.names)
    if not isinstance(held_out, (int, float)):
        named = [held_out] if isinstance(held_out, str) else list(held_out)
        for name in named:
            if name not in screen.names:
                raise missing_key(name, screen.names, f"a perturbation in obs[{screen.key!r}]")
        if not 0 < len(set(named)) < n:
            raise ValueError(
                f"Expected held_out to leave perturbations to train on and to score, got {len(set(named))} of {n}. "
                "Pass fewer names, but at least one."
            )
        return np.sort([screen.names.index(name) for name in set(named)])
    if not 0 < held_out < 1:
        raise ValueError(f"Expected held_out to be a fraction between 0 and 1, or names, got {held_out}. Pass 0.2.")
    group = np.arange(n) if compounds is None or compounds.scaffolds is None else np.array(compounds.scaffolds)
    kinds = np.unique(group)
    if len(kinds) < 2:
        raise ValueError("Expected compounds of at least 2 scaffolds, got 1. Pass the names to hold out as held_out=.")
    n_wanted, chosen = max(1, round(held_out * n)), []
    for kind in np.random.default_rng(seed).permutation(kinds)[: len(kinds) - 1]:
        members = np.flatnonzero(group == kind)
        if len(chosen) + len(members) <= max(n_wanted, len(members) if not chosen else 0):
            chosen += members.tolist()
    return np.sort(chosen)


def _cells(task: _Task, doses: FloatArray | None, validation: float, seed: int) -> Cells:
    """Pair each training cell with a control cell of its batch, and hold out cells for validation."""
    screen, rng = task.screen, np.random.default_rng(seed)
    code = np.full(len(screen.code), -2)
    code[screen.code == -1] = -1
    for number, p in enumerate(task.learnt):
        code[screen.code == p] = number
    inputs = np.arange(len(code))
    for batch in np.unique(screen.batch[code >= -1]):
        controls = np.flatnonzero((screen.code == -1) & (screen.batch == batch))
        members = np.flatnonzero((code >= -1) & (screen.batch == batch))
        inputs[members] = rng.choice(controls, len(members))
    used = np.flatnonzero(code >= -1)
    if not 0 <= validation < 1:
        raise ValueError(f"Expected validation from 0 to below 1, got {validation}. Pass 0.1.")
    order = rng.permutation(used)
    n = round(validation * len(used))
    held = np.sort(order[:n])
    targets: dict[str, Any] = {"perturbation": np.where(code < 0, -1, code)}
    if doses is not None:
        targets["dose"] = np.nan_to_num(doses).astype(np.float32)
    return Cells(np.sort(order[n:]), held, targets, inputs=inputs)


def _record(
    adata: AnnData,
    task: _Task,
    trained: CellModel,
    start: CellModel,
    doses: FloatArray | None,
    params: dict[str, Any],
    seed: int,
    device: str,
) -> None:
    """Score the model and the baselines on the held-out perturbations and write the tables."""
    screen, asked = task.screen, task.held_out
    x = log_normalised(task.source, task.match, np.arange(len(screen.code)))
    predicted, confidence = _predicted(task, trained, doses, seed, device)
    place = {name: i for i, name in enumerate(task.names)}
    measured = task.match.measured
    tables = {
        "trained genes": trained.gene_table().detach().float().cpu().numpy()[measured],
        "initial genes": start.gene_table().detach().float().cpu().numpy()[measured],
    }
    known = Task(
        changes(x, screen, task.trained.tolist()).change,
        [screen.genes[p] for p in task.trained],
        [screen.genes[p] for p in asked],
        place,
    )
    vectors = None
    if task.compounds is not None:
        vectors = (task.compounds.vectors[task.trained], task.compounds.vectors[asked])
    are_bits = task.compounds is not None and task.compounds.are_bits
    found = {MODEL: predicted, **baselines(known, tables, vectors, are_bits=are_bits, random_state=seed)}
    own = np.zeros((len(asked), len(measured)), bool)
    for row, p in enumerate(asked):
        own[row, [place[gene] for gene in screen.genes[p] if gene in place and task.compounds is None]] = True
    has_genes = np.isfinite(predicted).all(1)
    scores = score(x, screen, asked, found, own, has_genes, random_state=seed)
    names = pd.Index([screen.names[p] for p in asked])
    split = pd.DataFrame(
        {
            "perturbation": screen.names,
            "held_out": np.isin(np.arange(len(screen.names)), asked),
            "has_genes": [task.compounds is not None or bool(of) for of in task.tokens],
            "n_cells": [len(screen.cells(p)) for p in range(len(screen.names))],
        }
    )
    record(
        adata, "perturbation", {**params, "random_state": seed}, scores.table, summary=scores.summary,
        confidence=pd.DataFrame({"perturbation": names, "confidence": confidence}),
        abstention=abstention(scores.table, pd.Series(confidence, index=names), MODEL), split=split,
    )  # fmt: skip
    _log_scores(scores)


def _predicted(
    task: _Task, model: CellModel, doses: FloatArray | None, seed: int, device: str
) -> tuple[FloatArray, FloatArray]:
    """Predict the changes of held-out perturbations from control cells of their batches, with the confidence."""
    screen, rng = task.screen, np.random.default_rng(seed)
    predicted = np.full((len(task.held_out), len(task.match.measured)), np.nan)
    confidence = np.full(len(task.held_out), np.nan)
    for row, p in enumerate(task.held_out):
        if task.compounds is None and not task.tokens[p]:
            continue
        cells = screen.cells(p)
        drawn = rng.choice(cells, min(len(cells), _MOST_CELLS), replace=False)
        inputs = np.array(
            [rng.choice(np.flatnonzero((screen.code == -1) & (screen.batch == b))) for b in screen.batch[drawn]]
        )
        vector = None if task.compounds is None else task.compounds.vectors[p]
        if vector is not None and doses is not None:
            vector = np.append(vector, np.log1p(doses[drawn].mean()))
        each = decoder_changes(model, task.source, task.match, inputs, task.tokens[p], vector, device)
        predicted[row], confidence[row] = each.mean(0), agreement(each)
    return predicted, confidence


def _log_scores(scores: Scores) -> None:
    """Log how the model compares with the mean baseline and the replicate."""
    summary = scores.summary
    of = summary[(summary["metric"] == "pearson") & (summary["among"] == summary["among"].iloc[-1])]
    of = of.set_index("method")["score"]
    parts = [f"{name} {of[name]:.3f}" for name in (MODEL, MEAN, REPLICATE) if name in of]
    log.info("scoring held-out perturbations, mean correlation of changes: %s", ", ".join(parts))
