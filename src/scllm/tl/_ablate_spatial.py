"""Compare predictors of expression with and without a plausibility term, and with baselines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata, groups
from scllm._log import details, log, progress
from scllm._names import listed
from scllm._results import record
from scllm._typing import FloatArray
from scllm.data.opened import closes_files
from scllm.models.base import CellModel
from scllm.tl._ledger import seen_groups
from scllm.tl._model import ModelLike, resolve
from scllm.tl._spatial_fold import BASELINES, NO_LM, Fit, Fold, SpotData
from scllm.tl._spatial_inputs import genes_to_predict

__all__ = ["ablate_spatial"]

Arm = Literal["none", "gaussian", "random", "permuted", "feature", "match", "nll", "masked"]
_ARMS: tuple[Arm, ...] = ("none", "gaussian", "random", "permuted", "feature", "match", "nll")
_FAMILIES = ("gpt2", "albert", "xlnet", "scgpt")


@closes_files
def ablate_spatial(
    adata: AnnData,
    *,
    lm: ModelLike,
    kinds: Sequence[Arm] = _ARMS,
    n_train_groups: Sequence[int] | int | None = None,
    n_seeds: int = 3,
    group_key: str = _keys.SECTION,
    use_rep: str | None = _keys.PATCH_FEATURES,
    layer: str | None = None,
    genes: Sequence[str] | None = None,
    n_top_genes: int | None = None,
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
    run_dir: str | PathLike[str] | None = None,
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
        the training sections of each fold alone; needs counts. Also a trained model or its path. That it was trained
        on one of the groups, or that nothing is known of its training spots, is an error unless ``allow_overlap`` names
        the groups. A group counts as trained on if its data set and donor (``obs["dataset"]`` and ``obs["donor"]``, or
        with ``_id``) or its name are among those of the training spots.
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
        Image features in ``obsm``. ``None``: the predictors are trained on the patches of
        :func:`scllm.pp.image_patches`, and of the baselines only the mean profile is left.
    layer
        Layer to predict. ``None``: ``X``.
    genes
        Genes to predict. ``None``: those that :func:`scllm.pp.spatially_variable` marked, or else all.
    n_top_genes
        Predict only that many of them: in each fold those with the highest Moran's I on its training sections, so that
        the held-out section has no part in the choice.
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
    run_dir
        Folder in which all trainings are kept. A call with the same folder goes on after the last finished training,
        and one with other ``kinds``, ``lm`` or ``n_seeds`` trains only what is new. ``None``: none is kept.
    random_state
        Seed; the seeds of the predictors are ``random_state``, ``random_state + 1``, ...

    Returns
    -------
    One row per number of training sections and arm: the scores of :func:`evaluate_spatial`, averaged over held-out
    sections and seeds (those of a language model if ``kinds`` has one that needs it, from the one of the fold), and the
    differences of ``pcc`` and ``correlation_error`` from the arm ``"none"``, each with a 95 % interval (``_low``,
    ``_high``). The intervals are from a paired bootstrap of contiguous blocks of spots within sections. They cover the
    choice of spots, not of patients.

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
    given = _language_model(lm, adata, plan.group, allow_overlap, kinds)
    data = SpotData.read(adata, layer, genes_to_predict(adata, genes), use_rep, n_neighbors, plan.group)
    options = {
        "use_rep": use_rep,
        "layer": layer,
        "n_neighbors": n_neighbors,
        "library_key": group_key,
        "size": size,
        "epochs": epochs,
        "device": device,
        "weight": weight,
    }
    pretraining = {"size": lm_size, "epochs": lm_epochs, "layer": layer, "device": device}
    uses_lm = not set(kinds) <= set(NO_LM)
    baselines = BASELINES if use_rep is not None else BASELINES[:1]
    log.info("fitting %d predictors on %d spots in %d sections", plan.n_fits, adata.n_obs, len(plan.names))
    found: list[Fit] = []
    with _folder(run_dir) as folder, details():
        for n_train, held_out, train in progress(list(plan.folds()), desc="folds", unit="fold"):
            fold = Fold(
                adata, data, given, train, held_out, options, pretraining, folder, n_top_genes, uses_lm, random_state
            )
            for arm in (*baselines, *kinds):
                for seed in range(1 if arm in BASELINES else n_seeds):
                    found.append(fold.fit(n_train, arm, seed, gene_sets, n_resamples))
    table = _summarised(found)
    fits = pd.DataFrame(
        [{"n_train_groups": f.n_train, "arm": f.arm, "held_out": f.held_out, "seed": f.seed, **f.scores} for f in found]
    )
    params = {
        "lm": lm if isinstance(lm, str) else type(lm).__name__,
        "kinds": kinds,
        "n_seeds": n_seeds,
        "n_top_genes": n_top_genes,
        "weight": weight,
        "group_key": group_key,
        "use_rep": use_rep,
        "layer": layer,
        "random_state": random_state,
    }
    record(adata, "ablate_spatial", params, table, fits=fits)
    return table


@contextmanager
def _folder(run_dir: str | PathLike[str] | None) -> Iterator[Path]:
    """Yield the folder of trainings, which is removed at the end if none was passed."""
    if run_dir is not None:
        yield Path(run_dir)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


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


def _language_model(
    lm: ModelLike, adata: AnnData, group: pd.Series, allowed: Sequence[str], kinds: Sequence[str]
) -> str | CellModel:
    """Return the name of a family, or a model that has not been trained on the held-out groups."""
    model = lm if isinstance(lm, str) and lm in _FAMILIES else resolve(lm, adata)
    family = model if isinstance(model, str) else model.family
    if "masked" in kinds and family != "scgpt":
        raise ValueError(
            f"Expected lm to be an scgpt model for the kind 'masked', which hides values, got {family}. Leave 'masked' "
            "out, or pass lm='scgpt'."
        )
    if isinstance(model, str):
        return model
    if model.trained_on is None:
        seen, what = set(group), "but nothing is known of its training spots, which may be of"
    else:
        seen, what = seen_groups(model.trained_on, adata.obs, group), "but it may have been on"
    overlap = sorted(seen - set(allowed))
    if overlap:
        raise ValueError(
            f"Expected a language model that has not been trained on held-out groups, {what} {listed(overlap)}. "
            f"Pass the name of a family to train it on the training groups alone, or allow_overlap={overlap!r}."
        )
    return model


def _summarised(found: list[Fit]) -> pd.DataFrame:
    """Average over sections and seeds, and compare each arm with ``"none"``."""
    rows = []
    for n_train, arm in dict.fromkeys((fit.n_train, fit.arm) for fit in found):
        ours, plain = ([fit for fit in found if (fit.n_train, fit.arm) == (n_train, one)] for one in (arm, "none"))
        means = pd.DataFrame([fit.scores for fit in ours]).mean().to_dict()
        row = {"n_train_groups": n_train, "arm": arm, "n_fits": len(ours), **means}
        if arm != "none":
            row |= _compared(_samples(ours) - _samples(plain))
        rows.append(row)
    return pd.DataFrame(rows)


def _samples(fits: list[Fit]) -> FloatArray:
    """Average the samples over sections and seeds, of which every section has as many."""
    return np.mean([fit.samples for fit in fits], axis=0)


def _compared(differences: FloatArray) -> dict[str, float]:
    """Return differences of two scores, with intervals from a paired bootstrap of blocks within sections."""
    found: dict[str, float] = {}
    for name, values in zip(("pcc", "correlation_error"), differences.T, strict=True):
        low, high = np.quantile(values[1:], (0.025, 0.975)) if len(values) > 1 else (np.nan, np.nan)
        found |= {f"{name}_difference": float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found
