"""How well an embedding keeps cell types apart and batches together."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_samples,
)
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scllm._typing import CSR, FloatArray, IntArray
from scllm.metrics._labels import classification_scores

__all__ = [
    "agreement",
    "batch_mixing",
    "clustering_agreement",
    "graph_connectivity",
    "knn_accuracy",
    "label_transfer",
    "logistic_regression_scores",
    "silhouette_batch",
    "silhouette_label",
]

MAX_SILHOUETTES = 20_000
_MIN_CELLS = 10  # of a class, so that the rarest still has a silhouette


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


def silhouette_label(
    embedding: FloatArray, labels: ArrayLike, *, max_cells: int = MAX_SILHOUETTES, random_state: int = 0
) -> float:
    """Score how compact and well separated the classes are: ``(ASW + 1) / 2`` with the average silhouette width (scIB).

    One half means that cells are as near to another class as to their own.

    Parameters
    ----------
    embedding
        ``(n, d)``.
    labels
        Class of each cell.
    max_cells
        The cost is quadratic in cells. If there are more, the score is estimated on about this many, drawn from each
        class in proportion to its size, and at least 10 from each.
    random_state
        Seed for drawing cells.
    """
    labels = np.asarray(labels)
    cells, weights = _stratified(labels, max_cells, random_state)
    return (float(np.average(silhouette_samples(embedding[cells], labels[cells]), weights=weights)) + 1) / 2


def silhouette_batch(
    embedding: FloatArray,
    labels: ArrayLike,
    batches: ArrayLike,
    *,
    max_cells: int = MAX_SILHOUETTES,
    random_state: int = 0,
) -> float:
    """Score how little the batches differ within each class: the mean over classes of ``mean(1 - |s|)`` (scIB).

    ``s`` is a cell's silhouette width by batch among the cells of its class. Classes that come from one batch, or where
    each cell is a batch of its own, are left out; NaN if no other class is there.

    Parameters
    ----------
    embedding
        ``(n, d)``.
    labels, batches
        Class and batch of each cell.
    max_cells
        As for :func:`silhouette_label`; cells are drawn from each class and batch.
    random_state
        Seed for drawing cells.
    """
    label, batch = (np.unique(np.asarray(names), return_inverse=True)[1] for names in (labels, batches))
    stratum = label * (batch.max() + 1) + batch
    drawn, weights = _stratified(stratum, max_cells, random_state)
    scores = []
    for each in np.unique(label):
        here = label[drawn] == each
        cells = drawn[here]
        if 1 < len(np.unique(batch[cells])) < len(cells):
            widths = silhouette_samples(embedding[cells], batch[cells])
            scores.append(np.average(1 - np.abs(widths), weights=weights[here]))
    return float(np.mean(scores)) if scores else float("nan")


def _stratified(strata: NDArray, max_cells: int, random_state: int) -> tuple[IntArray, FloatArray]:
    """At most about ``max_cells`` cells, in order, and how many cells each of them stands for."""
    _, stratum, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    share = min(1.0, max_cells / len(stratum))
    wanted = np.minimum(sizes, np.maximum(np.rint(share * sizes).astype(int), _MIN_CELLS))
    # cells in random order, then by stratum: the first of each are drawn
    order = np.random.default_rng(random_state).permutation(len(stratum))
    order = order[np.argsort(stratum[order], kind="stable")]
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    cells = np.sort(order[place < np.repeat(wanted, sizes)])
    return cells, (sizes / wanted)[stratum[cells]]


def graph_connectivity(graph: CSR, labels: ArrayLike) -> float:
    """Whether each class hangs together in the neighbour graph: its largest component / its cells, mean (scIB)."""
    _, label, sizes = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    edges = sparse.coo_array(graph)
    inside = label[edges.row] == label[edges.col]
    within = sparse.coo_array((edges.data[inside], (edges.row[inside], edges.col[inside])), shape=graph.shape)
    component = connected_components(within, directed=False)[1]
    cells = pd.DataFrame({"label": label, "component": component}).value_counts(sort=False)
    return float((cells.groupby("label").max() / sizes).mean())


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
    counts = _neighbour_counts(graph, batch).astype(float)
    counts = counts[counts.sum(axis=1) > 0]
    around = _entropy(counts / counts.sum(axis=1, keepdims=True)).mean()
    return float(min(1.0, around / _entropy(np.bincount(batch)[None] / len(batch))[0]))


def agreement(embedding: FloatArray, reference: FloatArray, *, n_neighbors: int = 15) -> dict[str, float]:
    """Measure how similar two embeddings of the same cells are, such as those of a model and its int8 version.

    Parameters
    ----------
    embedding, reference
        ``(n, d)``, rows in the same order.
    n_neighbors
        Number of nearest neighbours to compare; fewer if there are fewer cells.

    Returns
    -------
    ``cosine_mean`` and ``cosine_min`` over cells, and ``knn_overlap``: the mean fraction of the ``n_neighbors`` nearest
    neighbours (Euclidean) in one embedding that are also nearest neighbours in the other.

    Examples
    --------
    >>> reference = np.random.default_rng(0).normal(size=(50, 8))
    >>> agreement(2 * reference, reference)["knn_overlap"]
    1.0
    """
    a, b = (np.asarray(x, np.float64) for x in (embedding, reference))
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"Expected two embeddings of the same shape and of at least two cells, got shapes {a.shape} and {b.shape}. "
            "Embed the same cells with both models."
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


def knn_accuracy(graph: CSR, labels: ArrayLike) -> float:
    """Accuracy of the majority vote of a cell's neighbours, the cell itself left out.

    Of labels with equally many votes, the first in alphabetical order is taken.

    Parameters
    ----------
    graph
        Stored entries are the neighbours of a row's cell, without the cell itself; their values are not read.
    labels
        Class of each cell.
    """
    _, label = np.unique(np.asarray(labels), return_inverse=True)
    return float(np.mean(_neighbour_counts(graph, label).argmax(axis=1) == label))


def label_transfer(
    reference: FloatArray,
    reference_labels: ArrayLike,
    embedding: FloatArray,
    labels: ArrayLike,
    *,
    n_neighbors: int = 15,
    max_cells: int = 20_000,
    random_state: int = 0,
) -> float:
    """Accuracy of labels that cells take over from their nearest neighbours (Euclidean) in a reference.

    The neighbours vote. Of labels with equally many votes, the first in alphabetical order is taken. Cells whose class
    the reference lacks are left out; NaN if no other cell is there.

    Parameters
    ----------
    reference, reference_labels
        Embedding ``(n_reference, d)`` and class of each cell of the reference.
    embedding, labels
        ``(n, d)`` and the class of each cell that gets a label.
    n_neighbors
        Number of neighbours that vote; fewer if the reference has fewer cells.
    max_cells
        The cost is that of comparing all pairs. If there are more cells on one side, about this many are drawn, from
        each class in proportion to its size, and at least 10 from each.
    random_state
        Seed for drawing cells.

    Examples
    --------
    >>> reference = np.array([[0.0], [0.1], [5.0], [5.1]])
    >>> label_transfer(reference, ["B", "B", "T", "T"], np.array([[0.2], [2.0]]), ["B", "T"], n_neighbors=2)
    0.5
    """
    known, sought = np.asarray(reference_labels), np.asarray(labels)
    asked = np.flatnonzero(np.isin(sought, known))
    if not len(asked):
        return float("nan")
    voters, _ = _stratified(known, max_cells, random_state)
    drawn, weights = _stratified(sought[asked], max_cells, random_state)
    asked = asked[drawn]
    search = NearestNeighbors(n_neighbors=min(n_neighbors, len(voters))).fit(reference[voters])
    nearest = search.kneighbors(embedding[asked], return_distance=False)
    names, code = np.unique(known[voters], return_inverse=True)
    votes = np.stack([(code[nearest] == each).sum(axis=1) for each in range(len(names))], axis=1)
    return float(np.average(names[votes.argmax(axis=1)] == sought[asked], weights=weights))


def _neighbour_counts(graph: CSR, group: IntArray) -> FloatArray:
    """How many neighbours of a cell are in each group, ``(n_cells, n_groups)``."""
    neighbours = sparse.csr_matrix(
        (np.ones(len(graph.indices), np.float32), graph.indices, graph.indptr), shape=graph.shape
    )
    return neighbours @ np.eye(group.max() + 1, dtype=np.float32)[group]


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
    """Compute the entropy of each row in nats."""
    return -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=1)
