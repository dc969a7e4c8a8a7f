"""Simple predictions of what perturbations change, with which a model is compared on the same split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scllm._typing import FloatArray

__all__ = ["MEAN", "NO_CHANGE", "Task", "baselines"]

NO_CHANGE, MEAN = "no change", "mean"

# Ahlmann-Eltze, Huber & Anders 2025, doi:10.1038/s41592-025-02772-6
_N_COMPONENTS, _RIDGE = 10, 0.1
_N_NEIGHBORS, _N_TREES = 5, 100


@dataclass(frozen=True)
class Task:
    """Changes after training perturbations, and the perturbations to predict.

    Parameters
    ----------
    change
        Measured changes of the training perturbations, ``(n_train, g)``.
    train, asked
        Genes of the training perturbations and of those to predict.
    place
        Position of each measured gene among the ``g`` genes, by name.
    """

    change: FloatArray
    train: Sequence[tuple[str, ...]]
    asked: Sequence[tuple[str, ...]]
    place: Mapping[str, int]

    @property
    def nothing(self) -> FloatArray:
        """No prediction for any perturbation, ``(n_asked, g)``."""
        return np.full((len(self.asked), self.change.shape[1]), np.nan)


def baselines(
    task: Task,
    embeddings: Mapping[str, FloatArray],
    vectors: tuple[FloatArray, FloatArray] | None = None,
    *,
    are_bits: bool = False,
    random_state: int = 0,
) -> dict[str, FloatArray]:
    """Predict changes with each baseline, ``(n_asked, g)``; rows are NaN where it cannot predict.

    Parameters
    ----------
    task
        What is known and asked.
    embeddings
        Vectors of the ``g`` genes, by the name of the table.
    vectors
        Vectors of the training and asked compounds; ``None`` for perturbed genes.
    are_bits
        Whether these are fingerprints of bits.
    random_state
        Seed of random forests.
    """
    mean = task.change.mean(0)
    found = {NO_CHANGE: np.zeros_like(task.nothing), MEAN: np.repeat(mean[None], len(task.asked), axis=0)}
    if vectors is not None:
        train, asked = vectors
        if are_bits:
            found["nearest by Tanimoto"] = _by_tanimoto(task.change, train, asked)
        else:
            found["nearest compounds"] = _fit_nearest(train, task.change)(asked)
        found["ridge on compounds"] = _fit_ridge(train, task.change)(asked)
        return found
    if any(len(genes) > 1 for genes in task.asked):
        found["additive"] = _additive(task)
        found["matching mean"] = _matching_mean(task)
    found["linear"] = _linear(task)
    fits = {"nearest neighbours": _fit_nearest, "ridge": _fit_ridge, "random forest": _forest(random_state)}
    for table, vector in embeddings.items():
        for name, fit in fits.items():
            found[f"{name} ({table})"] = _on_genes(task, vector, fit)
    return found


Fit = Callable[[FloatArray, FloatArray], Callable[[FloatArray], FloatArray]]


def _vectors(genes: Sequence[tuple[str, ...]], place: Mapping[str, int], table: FloatArray) -> FloatArray:
    """Sum the vectors of the genes of each perturbation; NaN where one is not measured."""
    nothing = np.full(table.shape[1], np.nan)
    return np.array([sum(table[place[g]] if g in place else nothing for g in names) for names in genes])


def _on_genes(task: Task, table: FloatArray, fit: Fit) -> FloatArray:
    """Predict from vectors of the perturbed genes."""
    train, asked = (_vectors(genes, task.place, table) for genes in (task.train, task.asked))
    known, can = np.isfinite(train).all(1), np.isfinite(asked).all(1)
    found = task.nothing
    if known.sum() >= 2 and can.any():
        found[can] = fit(train[known], task.change[known])(asked[can])
    return found


def _fit_nearest(train: FloatArray, change: FloatArray) -> Callable[[FloatArray], FloatArray]:
    from sklearn.neighbors import KNeighborsRegressor

    k = min(_N_NEIGHBORS, len(train))
    return KNeighborsRegressor(k, weights="distance", metric="cosine").fit(train, change).predict


def _fit_ridge(train: FloatArray, change: FloatArray) -> Callable[[FloatArray], FloatArray]:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13))).fit(train, change).predict


def _forest(seed: int) -> Fit:
    def fit(train: FloatArray, change: FloatArray) -> Callable[[FloatArray], FloatArray]:
        from sklearn.decomposition import PCA
        from sklearn.ensemble import RandomForestRegressor

        # trees predict a few components, because a split for thousands of genes at once is slow
        n = min(_N_COMPONENTS, len(change) - 1, change.shape[1])
        reduced = PCA(n, random_state=seed).fit(change)
        target = reduced.transform(change)
        forest = RandomForestRegressor(_N_TREES, random_state=seed).fit(train, target if n > 1 else target.ravel())
        return lambda asked: reduced.inverse_transform(forest.predict(asked).reshape(len(asked), -1))

    return fit


def _linear(task: Task) -> FloatArray:
    """Predict with gene vectors from the principal components of the changes (Ahlmann-Eltze et al. 2025).

    Changes are ``G W P' + b``: ``G`` are the components of the genes, ``P`` those of the perturbed genes, ``b`` is the
    mean change, and ``W`` is fitted with a ridge penalty of 0.1 on either side.
    """
    mean = task.change.mean(0)
    centered = task.change - mean
    n = min(_N_COMPONENTS, *centered.shape)
    _, scale, right = np.linalg.svd(centered, full_matrices=False)
    genes = right[:n].T * scale[:n]  # (g, n)
    train, asked = (_vectors(names, task.place, genes) for names in (task.train, task.asked))
    known, can = np.isfinite(train).all(1), np.isfinite(asked).all(1)
    found = task.nothing
    if not known.any() or not can.any():
        return found
    penalty = _RIDGE * np.eye(n)
    left = np.linalg.solve(genes.T @ genes + penalty, genes.T @ centered[known].T)
    weights = np.linalg.solve(train[known].T @ train[known] + penalty, train[known].T @ left.T).T
    found[can] = (genes @ weights @ asked[can].T).T + mean
    return found


def _additive(task: Task) -> FloatArray:
    """Add the changes of single perturbations; the mean change stands for a gene that was not perturbed alone."""
    single = {genes[0]: change for genes, change in zip(task.train, task.change, strict=True) if len(genes) == 1}
    mean, found = task.change.mean(0), task.nothing
    for row, genes in enumerate(task.asked):
        if len(genes) > 1 and any(gene in single for gene in genes):
            found[row] = sum(single.get(gene, mean) for gene in genes)
    return found


def _matching_mean(task: Task) -> FloatArray:
    """Average over the genes the mean change of all training perturbations of each."""
    found = task.nothing
    for row, genes in enumerate(task.asked):
        sharing = [[i for i, names in enumerate(task.train) if gene in names] for gene in genes]
        means = [task.change[rows].mean(0) for rows in sharing if rows]
        if means:
            found[row] = np.mean(means, axis=0)
    return found


def _by_tanimoto(change: FloatArray, train: FloatArray, asked: FloatArray) -> FloatArray:
    """Predict the change of the training compound whose bits are most similar."""
    return change[_tanimoto(asked > 0, train > 0).argmax(1)]


def _tanimoto(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> FloatArray:
    both = one.astype(float) @ other.T.astype(float)
    either = one.sum(1)[:, None] + other.sum(1)[None] - both
    return np.divide(both, either, out=np.zeros_like(both), where=either > 0)
