"""Compare predictors of expression with and without a plausibility term, and with baselines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import nn

from scllm import _keys, metrics, models
from scllm._checks import check_adata, groups
from scllm._log import details, log, progress, warn
from scllm._names import listed
from scllm._results import record
from scllm._typing import FloatArray, IntArray
from scllm.data.encode import ValueEncoder
from scllm.data.opened import closes_files
from scllm.data.spots import nearest_spots, spatial_blocks, spot_graph, spot_positions
from scllm.data.targets import dense, normalised
from scllm.data.value_kind import value_kind
from scllm.engine.config import TrainConfig
from scllm.models.base import CellModel
from scllm.models.plausibility import GaussianPrior, Plausibility
from scllm.tl._evaluate_spatial import section_scores, summary
from scllm.tl._fit_spatial import expression_source, fit_spatial, genes_to_predict, predict_spatial
from scllm.tl._model import ModelLike, resolve
from scllm.tl._pretrain import pretrain
from scllm.tl._spatial_baselines import knn_prediction, mean_prediction, ridge_prediction

__all__ = ["ablate_spatial"]

Arm = Literal["none", "gaussian", "random", "permuted", "feature", "match", "nll", "masked"]
_ARMS: tuple[Arm, ...] = ("none", "gaussian", "random", "permuted", "feature", "match", "nll")
_BASELINES = ("mean", "ridge", "knn")
_FAMILIES = ("gpt2", "albert", "xlnet", "scgpt")
_BLOCKS = 8  # contiguous blocks of a section that are resampled
_INNER = 4  # blocks of the inner cross-validation with one training section


@closes_files
def ablate_spatial(
    adata: AnnData,
    *,
    lm: ModelLike,
    kinds: Sequence[Arm] = _ARMS,
    n_train_groups: Sequence[int] | int | None = None,
    n_seeds: int = 3,
    group_key: str = _keys.SECTION,
    use_rep: str = _keys.PATCH_FEATURES,
    layer: str | None = None,
    genes: Sequence[str] | None = None,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    weight: float = 0.1,
    lm_size: str = "tiny",
    lm_epochs: int = 20,
    allow_overlap: Sequence[str] = (),
    n_neighbors: int = 6,
    size: str = "base",
    epochs: int | None = None,
    n_resamples: int = 200,
    device: str = "auto",
    random_state: int = 0,
) -> pd.DataFrame:
    """Compare predictors with different plausibility terms and baselines, holding out each section in turn.

    All predictors are the same network on the same features (:func:`fit_spatial`); only the plausibility term differs.
    The baselines are the mean profile, ridge regression and nearest neighbours in feature space. Their settings are
    chosen by cross-validation over the training sections, or over contiguous blocks of spots if there is one. Nothing
    is chosen on the held-out section.

    Parameters
    ----------
    adata
        Spots by genes of at least two sections, with image features in ``obsm[use_rep]``.
    lm
        Family of the language model (``"gpt2"``, ``"albert"``, ``"xlnet"``, ``"scgpt"``), which is then pretrained on
        the training sections of each fold alone; needs counts. Also a trained model or its path: if it was trained on
        one of the sections, that is an error unless ``allow_overlap`` names it.
    kinds
        Plausibility terms: ``"none"``, ``"gaussian"`` (a Gaussian with shrunken covariance of the training spots),
        ``"random"`` (``"feature"`` of an untrained language model), ``"permuted"`` (``"feature"`` of the language model
        with its genes exchanged at random), and the kinds of :class:`scllm.models.Plausibility`.
    n_train_groups
        Numbers of training sections to compare. ``None``: all but the held-out one.
    n_seeds
        Number of trainings of each predictor, which differ in initial weights, validation spots and data order.
    group_key
        Column of ``obs`` with the sections or patients that are held out.
    use_rep
        Image features in ``obsm``.
    layer
        Layer to predict. ``None``: ``X``.
    genes
        Genes to predict. ``None``: those that :func:`scllm.pp.spatially_variable` marked, or else all.
    gene_sets
        Names of pathways and their genes, for ``pathway_pcc``.
    weight
        Weight of the plausibility term, as in :func:`fit_spatial`.
    lm_size, lm_epochs
        Size of the language model and passes over the training spots, if ``lm`` is the name of a family.
    allow_overlap
        Held-out groups on which ``lm`` may have been trained.
    n_neighbors, size, epochs
        As in :func:`fit_spatial`.
    n_resamples
        Number of bootstrap samples for the intervals.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    random_state
        Seed; the seeds of the predictors are ``random_state``, ``random_state + 1``, ...

    Returns
    -------
    One row per number of training sections and arm: the scores of :func:`evaluate_spatial`, averaged over held-out
    sections and seeds, and the differences of ``pcc`` and ``correlation_error`` from the arm ``"none"``, each with a
    95 % interval (``_low``, ``_high``). The intervals are from a paired bootstrap of contiguous blocks of spots within
    sections. They cover the choice of spots, not of patients.

    Writes
    ------
    ``adata.uns["scllm"]["ablate_spatial"]``
        ``params``, the returned ``table``, and ``fits``, the scores of each single fit.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=2, side=6, n_genes=16)
    >>> table = scllm.tl.ablate_spatial(
    ...     adata, lm="gpt2", kinds=["none", "gaussian"], use_rep="programmes", n_seeds=1, epochs=1, n_resamples=10
    ... )
    >>> table["arm"].tolist()
    ['mean', 'ridge', 'knn', 'none', 'gaussian']
    """
    check_adata(adata)
    plan = _plan(adata, group_key, n_train_groups, kinds, n_seeds)
    given = _language_model(lm, adata, plan.names, allow_overlap)
    names = genes_to_predict(adata, genes)
    data = _Data.read(adata, layer, names, use_rep, n_neighbors, plan.group, gene_sets)
    options = {
        "use_rep": use_rep,
        "layer": layer,
        "genes": names,
        "n_neighbors": n_neighbors,
        "library_key": group_key,
        "size": size,
        "epochs": epochs,
        "device": device,
        "weight": weight,
    }
    pretraining = {"size": lm_size, "epochs": lm_epochs, "layer": layer, "device": device}
    log.info("fitting %d predictors on %d spots in %d sections", plan.n_fits, adata.n_obs, len(plan.names))
    found: list[_Fit] = []
    with tempfile.TemporaryDirectory() as folder, details():
        for n_train, held_out, train in progress(list(plan.folds()), desc="folds", unit="fold"):
            fold = _Fold(adata, data, given, train, held_out, options, pretraining, Path(folder), random_state)
            for arm in (*_BASELINES, *kinds):
                for seed in range(1 if arm in _BASELINES else n_seeds):
                    guess = fold.predicted(arm, random_state + seed)
                    found.append(_Fit(n_train, arm, held_out, seed, guess, data.scored(fold.test, guess)))
    table = _summarised(found, data, n_resamples, random_state)
    fits = pd.DataFrame(
        [{"n_train_groups": f.n_train, "arm": f.arm, "held_out": f.held_out, "seed": f.seed, **f.scores} for f in found]
    )
    params = {
        "lm": lm if isinstance(lm, str) else type(lm).__name__,
        "kinds": kinds,
        "n_seeds": n_seeds,
        "weight": weight,
        "group_key": group_key,
        "use_rep": use_rep,
        "layer": layer,
        "random_state": random_state,
    }
    record(adata, "ablate_spatial", params, table, fits=fits)
    return table


@dataclass(frozen=True)
class _Plan:
    """Which sections are held out, and on which the rest is trained."""

    group: pd.Series
    names: list[str]
    n_train: list[int]
    n_fits: int

    def folds(self) -> Iterator[tuple[int, str, list[str]]]:
        """Yield the number of training sections, the held-out section and the training sections."""
        for n in self.n_train:
            for at, held_out in enumerate(self.names):
                # the next sections in turn, so that each is trained on equally often
                others = [*self.names[at + 1 :], *self.names[:at]]
                yield n, held_out, others[:n]


def _plan(
    adata: AnnData, group_key: str, n_train: Sequence[int] | int | None, kinds: Sequence[str], n_seeds: int
) -> _Plan:
    group = groups(adata.obs, group_key)
    names = list(map(str, group.cat.categories))
    if len(names) < 2 or group.isna().any():
        raise ValueError(
            f"Expected at least 2 groups in obs[{group_key!r}] and a group for every spot, got {len(names)} groups and "
            f"{int(group.isna().sum())} spots without one. Pass another group_key."
        )
    numbers = [len(names) - 1] if n_train is None else [n_train] if isinstance(n_train, int) else list(n_train)
    if not numbers or not all(1 <= n < len(names) for n in numbers):
        raise ValueError(
            f"Expected n_train_groups from 1 to {len(names) - 1}, because {len(names)} groups are there and one is "
            f"held out, got {numbers}. Correct it."
        )
    known = (*_ARMS, "masked")
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or "none" not in kinds or n_seeds < 1:
        what = f"got {unknown[0]!r}" if unknown else f"got kinds={list(kinds)} and n_seeds={n_seeds}"
        raise ValueError(
            f"Expected kinds out of {list(known)}, 'none' among them because the others are compared with it, and "
            f"n_seeds of at least 1, {what}. Correct them."
        )
    n_fits = len(numbers) * len(names) * len(kinds) * n_seeds
    return _Plan(group.astype(str), names, numbers, n_fits)


def _language_model(lm: ModelLike, adata: AnnData, names: list[str], allowed: Sequence[str]) -> str | CellModel:
    """Return the name of a family, or a model that has not been trained on the held-out groups."""
    if isinstance(lm, str) and lm in _FAMILIES:
        return lm
    model = resolve(lm, adata)
    if model.trained_on is None:
        warn(
            "It is not known on which spots the language model was trained, because their obs named no data set or "
            "donor. Pass the name of a family, such as 'gpt2', to train it on the training sections alone."
        )
        return model
    seen = set(model.trained_on["donor"].astype(str)) | set(model.trained_on["dataset"].astype(str))
    overlap = sorted((set(names) & seen) - set(allowed))
    if overlap:
        raise ValueError(
            f"Expected a language model that has not been trained on held-out groups, but it has on {listed(overlap)}. "
            f"Pass the name of a family to train it on the training groups alone, or allow_overlap={overlap!r}."
        )
    return model


@dataclass(frozen=True)
class _Data:
    """Dense expression of the chosen genes, features with those of the neighbours, and positions."""

    expression: FloatArray
    inputs: FloatArray
    xy: FloatArray
    group: pd.Series
    sets: Mapping[str, IntArray]

    @classmethod
    def read(
        cls,
        adata: AnnData,
        layer: str | None,
        names: list[str],
        use_rep: str,
        n_neighbors: int,
        group: pd.Series,
        gene_sets: Mapping[str, Sequence[str]] | None,
    ) -> _Data:
        source = expression_source(adata, layer)
        rows, columns = np.arange(source.n_obs), adata.var_names.get_indexer(names)
        is_counts = value_kind(source.read(rows[:4096])) == "counts"
        expression = dense(normalised(source, rows, is_counts=is_counts), columns)
        features = np.asarray(adata.obsm[use_rep], np.float32)
        xy = spot_positions(adata.obsm, adata.obs_names)
        if n_neighbors:
            near = nearest_spots(xy, group, n_neighbors)
            features = np.hstack([features, features[near].mean(axis=1)])
        index = pd.Index(names)
        sets = {name: index.get_indexer(list(genes)) for name, genes in (gene_sets or {}).items()}
        return cls(
            expression, features, xy, group, {name: at[at >= 0] for name, at in sets.items() if (at >= 0).sum() > 1}
        )

    def scored(self, spots: IntArray, guess: FloatArray) -> dict[str, float]:
        """Score predictions of the spots of the held-out section."""
        truth = self.expression[spots]
        graph = spot_graph(self.xy[spots], pd.Series("", index=range(len(spots))))
        return summary(truth, guess, section_scores(truth, guess, graph), self.sets)


@dataclass
class _Fold:
    """One held-out section."""

    adata: AnnData
    data: _Data
    given: str | CellModel
    train_names: list[str]
    held_out: str
    options: Mapping[str, Any]
    pretraining: Mapping[str, Any]
    folder: Path
    seed: int
    _lm: CellModel | None = field(default=None, repr=False)

    @property
    def train(self) -> IntArray:
        """Rows of the training spots."""
        return np.flatnonzero(self.data.group.isin(self.train_names))

    @property
    def test(self) -> IntArray:
        """Rows of the held-out spots."""
        return np.flatnonzero(self.data.group == self.held_out)

    def predicted(self, arm: str, seed: int) -> FloatArray:
        """Predict the held-out spots with one arm."""
        data, train, test = self.data, self.train, self.test
        known = data.inputs[train], data.expression[train], self._inner()
        match arm:
            case "mean":
                return mean_prediction(data.expression[train], len(test))
            case "ridge":
                return ridge_prediction(*known, data.inputs[test])[0]
            case "knn":
                return knn_prediction(*known, data.inputs[test])[0]
        spots = self.adata[train].copy()
        with tempfile.TemporaryDirectory(dir=self.folder) as run_dir:
            model = fit_spatial(
                spots, lm=cast(Any, self._term(arm, seed)), run_dir=run_dir, random_state=seed, **self.options
            )
        held_out = self.adata[test].copy()
        predict_spatial(held_out, model, library_key=self.options["library_key"], device=self.options["device"])
        columns = held_out.var_names.get_indexer(self.options["genes"])
        return held_out.layers[_keys.PREDICTED][:, columns]

    def _inner(self) -> IntArray:
        """Return the fold of each training spot: its section, or its block if there is one section."""
        group = self.data.group.iloc[self.train]
        if len(self.train_names) > 1:
            return pd.factorize(group)[0]
        return spatial_blocks(self.data.xy[self.train], _INNER)

    def _term(self, arm: str, seed: int) -> nn.Module | None:
        if arm == "none":
            return None
        if arm == "gaussian":
            return GaussianPrior(self.data.expression[self.train])
        names = list(self.options["genes"])
        kind = arm if arm in ("feature", "match", "nll", "masked") else "feature"
        if arm == "permuted":
            names = list(np.random.default_rng(seed).permutation(names))
        lm = self._untrained(seed) if arm == "random" else self._trained()
        return Plausibility(lm, kind=cast(Any, kind), genes=names, random_state=seed)

    def _trained(self) -> CellModel:
        """Return the language model, trained on the training sections of this fold unless one was given."""
        if isinstance(self.given, CellModel):
            return self.given
        if self._lm is None:
            spots = self.adata[self.train, list(self.options["genes"])].copy()
            options = {name: value for name, value in self.pretraining.items() if name != "size"}
            config = TrainConfig(schedule="cosine", warmup=20)
            with tempfile.TemporaryDirectory(dir=self.folder) as run_dir:
                self._lm = pretrain(
                    spots,
                    self._untrained(self.seed),
                    lr=1e-3,
                    config=config,
                    run_dir=run_dir,
                    random_state=self.seed,
                    **options,
                )
        return self._lm

    def _untrained(self, seed: int) -> CellModel:
        """Return a language model with new weights, like the trained one."""
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            if isinstance(self.given, str):
                genes = list(self.options["genes"])
                encoder = ValueEncoder(max_len=len(genes) + 1) if self.given == "scgpt" else None
                return models.build(
                    self.given, vocab=genes, encoder=encoder, size=self.pretraining["size"], dropout=0.0
                )
            return type(self.given)(self.given.config, self.given.vocab, self.given.encoder)


@dataclass(frozen=True)
class _Fit:
    """The predictions of one arm for one held-out section."""

    n_train: int
    arm: str
    held_out: str
    seed: int
    guess: FloatArray
    scores: dict[str, float]


def _summarised(found: list[_Fit], data: _Data, n_resamples: int, seed: int) -> pd.DataFrame:
    """Average over sections and seeds, and compare each arm with ``"none"``."""
    rows = []
    for n_train, arm in dict.fromkeys((fit.n_train, fit.arm) for fit in found):
        fits = [fit for fit in found if (fit.n_train, fit.arm) == (n_train, arm)]
        plain = [fit for fit in found if (fit.n_train, fit.arm) == (n_train, "none")]
        means = pd.DataFrame([fit.scores for fit in fits]).mean().to_dict()
        row = {"n_train_groups": n_train, "arm": arm, "n_fits": len(fits), **means}
        if arm != "none":
            row |= _compared(fits, plain, data, n_resamples, seed)
        rows.append(row)
    return pd.DataFrame(rows)


def _compared(fits: list[_Fit], plain: list[_Fit], data: _Data, n_resamples: int, seed: int) -> dict[str, float]:
    """Return differences of two scores, with intervals from a paired bootstrap of blocks within sections."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(n_resamples + 1):
        per_section = []
        for held_out in dict.fromkeys(fit.held_out for fit in fits):
            spots = np.flatnonzero(data.group == held_out)
            # the first sample is the section as it is
            drawn = np.arange(len(spots)) if number == 0 else _resampled(data.xy[spots], rng)
            truth = data.expression[spots][drawn]
            ours, theirs = (
                np.mean([_two_scores(truth, fit.guess[drawn]) for fit in some if fit.held_out == held_out], axis=0)
                for some in (fits, plain)
            )
            per_section.append(ours - theirs)
        samples.append(np.mean(per_section, axis=0))
    found: dict[str, float] = {}
    for at, name in enumerate(("pcc", "correlation_error")):
        drawn_scores = np.array(samples)[1:, at]
        low, high = np.quantile(drawn_scores, (0.025, 0.975)) if n_resamples else (np.nan, np.nan)
        found |= {f"{name}_difference": samples[0][at], f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _two_scores(truth: FloatArray, guess: FloatArray) -> tuple[float, float]:
    return float(np.nanmean(metrics.pearson(truth, guess))), metrics.correlation_error(truth, guess)


def _resampled(xy: FloatArray, rng: np.random.Generator) -> IntArray:
    """Draw contiguous blocks of spots with replacement, as many as there are."""
    block = spatial_blocks(xy, _BLOCKS)
    drawn = rng.integers(block.max() + 1, size=block.max() + 1)
    return np.concatenate([np.flatnonzero(block == one) for one in drawn])
