"""How good labels and embeddings are: small functions on plain arrays.

Unless said otherwise every score lies between 0 (worst) and 1 (best). scIB below is Luecken et al., "Benchmarking
atlas-level data integration in single-cell genomics", *Nature Methods* 2022, doi:10.1038/s41592-021-01336-8.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.special import gammaln
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    normalized_mutual_info_score,
    recall_score,
    roc_auc_score,
    roc_curve,
    silhouette_samples,
    silhouette_score,
)
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scllm._bootstrap import bootstrap_interval, value_scores
from scllm._calibration import all_labels, expected_calibration_error, reliability, scored_labels, temperature
from scllm._typing import CSR, FloatArray, IntArray

__all__ = [
    "BATCH_METRICS",
    "BIO_METRICS",
    "BIO_WEIGHT",
    "agreement",
    "batch_mixing",
    "bootstrap_interval",
    "class_f1",
    "classification_scores",
    "clustering_agreement",
    "confusion",
    "expected_calibration_error",
    "graph_connectivity",
    "knn_accuracy",
    "logistic_regression_scores",
    "mean_roc",
    "permutation_bound",
    "regression_scores",
    "reliability",
    "silhouette_batch",
    "silhouette_label",
    "temperature",
    "unigram_nats",
]

BIO_METRICS = ("nmi", "ari", "silhouette_label", "knn_accuracy", "logreg_accuracy", "logreg_macro_f1")
BATCH_METRICS = ("silhouette_batch", "graph_connectivity", "batch_mixing")
BIO_WEIGHT = 0.6
"""Share of the bio mean in the overall score; 0.4 is left for the batch mean (scIB)."""


def classification_scores(
    truth: ArrayLike, predicted: ArrayLike, probabilities: FloatArray | None = None, classes: ArrayLike | None = None
) -> dict[str, float]:
    """Accuracy, macro F1 and balanced accuracy; with ``probabilities`` also areas under curves and calibration.

    Averages go over the classes of ``truth``: a prediction outside them ("unknown") is a miss of the true class and no
    class of its own.

    Parameters
    ----------
    truth, predicted
        Labels, ``(n,)``.
    probabilities
        ``(n, k)``, one column for each of ``classes``. Classes without a cell, or with all of them, have no AUROC.
    classes
        Names of the columns; ``None`` = the sorted classes of ``truth``.

    Returns
    -------
    ``accuracy``, ``macro_f1``, ``balanced_accuracy`` and, with probabilities, ``auroc`` and ``auprc`` (average
    precision): means over classes of one class against the rest; and ``ece``, see
    :func:`expected_calibration_error`: 0 is best.

    Examples
    --------
    >>> scores = classification_scores(["B", "B", "T", "T"], ["B", "T", "T", "T"])
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'accuracy': 0.75, 'macro_f1': 0.733, 'balanced_accuracy': 0.75}
    """
    truth, predicted = all_labels(truth), np.asarray(predicted)
    known = np.unique(truth)
    scores = {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, labels=known, average="macro", zero_division=0)),
        "balanced_accuracy": float(recall_score(truth, predicted, labels=known, average="macro", zero_division=0)),
    }
    if probabilities is not None:
        truth, probabilities, columns = scored_labels(truth, probabilities, classes)
        is_class = truth[:, None] == columns  # (n, k)
        scored = is_class.any(axis=0) & ~is_class.all(axis=0)
        for name, area in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
            areas = [area(is_class[:, k], probabilities[:, k]) for k in np.flatnonzero(scored)]
            scores[name] = float(np.mean(areas)) if areas else float("nan")
        scores["ece"] = expected_calibration_error(truth, probabilities, columns)
    return scores


def class_f1(truth: ArrayLike, predicted: ArrayLike, classes: ArrayLike) -> FloatArray:
    """F1 of each class, ``(k,)``: the harmonic mean of precision and recall; NaN for a class without a cell.

    Examples
    --------
    >>> class_f1(["B", "B", "T", "T"], ["B", "T", "T", "T"], ["B", "T", "NK"]).round(3)
    array([0.667, 0.8  ,   nan])
    """
    truth, names = np.asarray(truth), np.asarray(classes)
    found = f1_score(truth, np.asarray(predicted), labels=names, average=None, zero_division=0)
    return np.where(np.isin(names, truth), found, np.nan)


def regression_scores(truth: ArrayLike, predicted: ArrayLike) -> dict[str, float]:
    """``r2`` (below 0 for what is worse than the mean), ``pearson`` and ``mae``, the mean absolute error (0 is best).

    NaN where it is not defined: for values that are all alike.

    Examples
    --------
    >>> scores = regression_scores([1.0, 2.0, 3.0], [1.5, 2.0, 2.5])
    >>> {name: round(value, 3) for name, value in scores.items()}
    {'r2': 0.75, 'pearson': 1.0, 'mae': 0.333}
    """
    truth = np.asarray(truth, float)
    found = value_scores(truth, np.asarray(predicted, float), np.ones((1, len(truth))))
    return {name: float(value[0]) for name, value in found.items()}


def mean_roc(
    truth: ArrayLike, probabilities: FloatArray, classes: ArrayLike | None = None, *, n_points: int = 201
) -> tuple[FloatArray, FloatArray]:
    """False and true positive rate of one class against the rest, the latter averaged over classes.

    Parameters
    ----------
    truth
        Labels, ``(n,)``.
    probabilities
        ``(n, k)``, one column for each of ``classes``. Classes without a cell, or with all of them, are left out.
    classes
        Names of the columns; ``None`` = the sorted classes of ``truth``.
    n_points
        Rates between 0 and 1 at which curves are averaged.
    """
    truth, probabilities, names = scored_labels(truth, probabilities, classes)
    is_class = truth[:, None] == names
    scored = np.flatnonzero(is_class.any(axis=0) & ~is_class.all(axis=0))
    false = np.linspace(0, 1, n_points)
    curves = [roc_curve(is_class[:, k], probabilities[:, k]) for k in scored]
    true = [np.interp(false, at, rate) for at, rate, _ in curves]
    return np.r_[0, false], np.r_[0, np.mean(true, axis=0) if true else np.full(n_points, np.nan)]


def confusion(truth: ArrayLike, predicted: ArrayLike, *, rows: ArrayLike, columns: ArrayLike) -> IntArray:
    """Cells of each true class (row) by predicted class (column), ``(len(rows), len(columns))``.

    Examples
    --------
    >>> confusion(["B", "B", "T"], ["B", "unknown", "T"], rows=["B", "T"], columns=["B", "T", "unknown"])
    array([[1, 0, 1],
           [0, 1, 0]])
    """
    names = list(dict.fromkeys([*rows, *columns]))
    counts = confusion_matrix(np.asarray(truth), np.asarray(predicted), labels=names)
    place = {name: at for at, name in enumerate(names)}
    return counts[np.ix_([place[name] for name in rows], [place[name] for name in columns])]


def clustering_agreement(clusterings: Iterable[ArrayLike], labels: ArrayLike) -> tuple[float, float]:
    """NMI and ARI of the clustering that agrees best with the labels, by NMI.

    Clusterings are of one graph at several resolutions: how finely it was cut says nothing about the embedding, so the
    best cut counts (scIB). NMI is ``2 I(C; L) / (H(C) + H(L))``; ARI is the Rand index adjusted for chance, 0 at chance
    and negative below it.

    Examples
    --------
    >>> clustering_agreement([[0, 0, 0, 0], [0, 0, 1, 1]], ["B", "B", "T", "T"])
    (1.0, 1.0)
    """
    scored = [(normalized_mutual_info_score(labels, clusters), clusters) for clusters in clusterings]
    nmi, best = max(scored, key=lambda pair: pair[0])
    return float(nmi), float(adjusted_rand_score(labels, best))


def silhouette_label(embedding: FloatArray, labels: ArrayLike) -> float:
    """How compact and apart the classes lie: ``(ASW + 1) / 2`` with the average silhouette width ASW (scIB).

    One half means that cells are as near to another class as to their own.
    """
    return (float(silhouette_score(embedding, labels)) + 1) / 2


def silhouette_batch(embedding: FloatArray, labels: ArrayLike, batches: ArrayLike) -> float:
    """How little the batches lie apart within each class: the mean over classes of ``mean(1 - |s|)`` (scIB).

    ``s`` is a cell's silhouette width by batch among the cells of its class. Classes that come from one batch, or where
    each cell is a batch of its own, say nothing and are left out; NaN if none remains.
    """
    labels, batches = np.asarray(labels), np.asarray(batches)
    scores = []
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        if 1 < len(np.unique(batches[cells])) < len(cells):
            scores.append(np.mean(1 - np.abs(silhouette_samples(embedding[cells], batches[cells]))))
    return float(np.mean(scores)) if scores else float("nan")


def graph_connectivity(graph: CSR, labels: ArrayLike) -> float:
    """Whether each class hangs together in the neighbour graph: its largest component / its cells, mean (scIB)."""
    labels = np.asarray(labels)
    scores = []
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        component = connected_components(graph[cells][:, cells], directed=False)[1]
        scores.append(np.bincount(component).max() / len(cells))
    return float(np.mean(scores))


def batch_mixing(graph: CSR, batches: ArrayLike) -> float:
    """How mixed the batches are around a cell: mean entropy of its neighbours' batches / entropy of all, at most 1.

    ``-sum_b p_b log p_b`` with the share ``p_b`` of batch b among the neighbours: the entropy of batch mixing of
    Haghverdi et al., *Nature Biotechnology* 2018, doi:10.1038/nbt.4091. Unlike the other batch scores it does not know
    classes: where batches hold different cell types, 1 cannot and should not be reached.

    Parameters
    ----------
    graph
        Stored entries are the neighbours of a row's cell; their values are not read.
    batches
        Batch of each cell, at least two.
    """
    _, batch = np.unique(np.asarray(batches), return_inverse=True)
    is_batch = np.eye(batch.max() + 1)[batch]  # (n_cells, n_batches)
    neighbours = sparse.csr_matrix((np.ones(len(graph.indices)), graph.indices, graph.indptr), shape=graph.shape)
    counts = neighbours @ is_batch
    counts = counts[counts.sum(axis=1) > 0]
    around = _entropy(counts / counts.sum(axis=1, keepdims=True)).mean()
    return float(min(1.0, around / _entropy(is_batch.mean(axis=0, keepdims=True))[0]))


def agreement(embedding: FloatArray, reference: FloatArray, *, n_neighbors: int = 15) -> dict[str, float]:
    """How alike two embeddings of the same cells are, such as those of a model and of its int8 form.

    Parameters
    ----------
    embedding, reference
        ``(n, d)``, rows in the same order.
    n_neighbors
        Neighbours of a cell that are compared; fewer where there are fewer cells.

    Returns
    -------
    ``cosine_mean`` and ``cosine_min`` over cells, and ``knn_overlap``: the mean share of the
    ``n_neighbors`` nearest neighbours (Euclidean) in one embedding that are among the nearest in the other.

    Examples
    --------
    >>> reference = np.random.default_rng(0).normal(size=(50, 8))
    >>> agreement(2 * reference, reference)["knn_overlap"]
    1.0
    """
    a, b = (np.asarray(x, np.float64) for x in (embedding, reference))
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"the embeddings are of shape {a.shape} and {b.shape}, two of one shape and of at least two cells "
            "expected. Embed the same cells with both models."
        )
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.where(lengths > 0, lengths, 1)
    n_neighbors = min(n_neighbors, len(a) - 1)
    near, of_reference = (
        NearestNeighbors(n_neighbors=n_neighbors).fit(x).kneighbors(return_distance=False) for x in (a, b)
    )
    shared = [len(np.intersect1d(*pair)) / n_neighbors for pair in zip(near, of_reference)]
    found = {"cosine_mean": cosine.mean(), "cosine_min": cosine.min(), "knn_overlap": np.mean(shared)}
    return {name: float(value) for name, value in found.items()}


def knn_accuracy(
    embedding: FloatArray, labels: ArrayLike, *, n_neighbors: int = 15, n_folds: int = 5, random_state: int = 0
) -> float:
    """Accuracy of the majority vote of the ``n_neighbors`` nearest cells of the other folds; folds are stratified."""
    labels = np.asarray(labels)
    n_neighbors = min(n_neighbors, len(labels) - -(-len(labels) // n_folds) - 1)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=random_state)
    predicted = cross_val_predict(KNeighborsClassifier(n_neighbors), embedding, labels, cv=folds)
    return float(accuracy_score(labels, predicted))


def logistic_regression_scores(
    embedding: FloatArray, labels: ArrayLike, *, n_folds: int = 5, random_state: int = 0
) -> dict[str, float]:
    """Out-of-fold scores of a logistic regression on the standardised embedding: what a linear probe can read off.

    See :func:`classification_scores` for what is returned.
    """
    labels = np.asarray(labels)
    folds = StratifiedKFold(n_folds, shuffle=True, random_state=random_state)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return classification_scores(labels, cross_val_predict(probe, embedding, labels, cv=folds))


def _entropy(shares: FloatArray) -> FloatArray:
    """Entropy of each row in nats."""
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1)


def permutation_bound(n_genes: ArrayLike) -> float:
    """``ln(n!) / n``: nats a gene below which no model tells the random order of ``n`` distinct genes, known or not.

    Of several sentences, summed over all before it is divided by the genes of all.

    Parameters
    ----------
    n_genes
        Genes of each sentence.

    Examples
    --------
    >>> round(permutation_bound([40]), 3)
    2.758
    """
    n = np.asarray(n_genes, float)
    return float(gammaln(n + 1).sum() / n.sum()) if n.sum() else np.nan


def unigram_nats(counts: CSR) -> tuple[float, float]:
    """Nats a gene of the two simplest models of gene sentences, each gene left out of what predicts it.

    Parameters
    ----------
    counts
        How often each gene stands in each place, places by genes.

    Returns
    -------
    The nats where every gene is as likely as it is frequent (each counted once more), and where that is mixed with how
    frequent it is in its place. The mixing weight is the best of 1, 10, ... 10,000.
    """
    seen = np.asarray(counts.sum(0), float).ravel()
    total = seen.sum()
    if not total:
        return np.nan, np.nan
    anywhere = seen / (total - 1 + counts.shape[1])
    here = sparse.coo_array(counts)
    n, gene = here.data.astype(float), here.coords[1]
    in_place = np.asarray(counts.sum(1), float).ravel()[here.coords[0]]
    by_place = [
        -(n * np.log((n - 1 + weight * anywhere[gene]) / (in_place - 1 + weight))).sum() / total
        for weight in 10.0 ** np.arange(5)
    ]
    return float(-(seen[seen > 0] * np.log(anywhere[seen > 0])).sum() / total), float(min(by_place))
