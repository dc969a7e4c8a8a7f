"""Score cell embeddings by labels and batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from scllm import _keys, metrics
from scllm._checks import check_adata, embedding, groups, labels, missing_key
from scllm._log import log, progress, warn
from scllm._names import listed
from scllm._results import record
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.value_kind import is_log_like
from scllm.tl._ledger import warn_of_seen

__all__ = ["benchmark"]

_RESOLUTIONS = np.arange(0.2, 2.01, 0.2)
_N_FOLDS = 5
_N_NEIGHBORS = 15  # includes the cell itself, as in scanpy
_N_COMPONENTS = 50
_N_STEPS = 4  # progress steps per embedding; one more with batches


def benchmark(
    adata: AnnData,
    *,
    use_rep: str | Sequence[str] = (_keys.EMBEDDING, _keys.PCA),
    key: str,
    batch_key: str | None = None,
    reference: str | Literal[True] | None = None,
) -> pd.DataFrame:
    """Score how well cell embeddings separate cell types and mix batches, with PCA as the baseline.

    An embedding is worth its cost if it scores better than 50 principal components of the same genes. The scores are
    those of scIB (Luecken et al. 2022, doi:10.1038/s41592-021-01336-8) and two probes; ``scllm.metrics`` explains each.
    Scores are averaged without rescaling them between embeddings, because with few embeddings rescaling would
    exaggerate small differences.

    Parameters
    ----------
    adata
        Cells with embeddings in ``obsm`` and labels in ``obs``.
    use_rep
        Keys of the embeddings in ``obsm``, one row of the result each. If ``"X_pca"`` is missing, it is computed (50
        components of log-normalised counts of all genes) but not written. A warning says how many cells come from
        donors or data sets that the model of an embedding was trained on.
    key
        Column of ``obs`` with cell types. Cells without a label, and those of classes with fewer than 5 cells, are not
        scored.
    batch_key
        Column of ``obs`` with batches. It adds the batch scores, which have a weight of 0.4 in the overall score.
    reference
        Batch of ``batch_key`` (a study, a donor) between which and the others labels are transferred by the 15 nearest
        neighbours, in both directions. ``"each"`` or ``True``: every batch in turn is the reference of the others, and
        the scores are means over batches. Cells of classes that the other side lacks are not scored.

    Returns
    -------
    A table with one row per embedding (the index) and these columns:

    - ``nmi`` and ``ari`` of Leiden clusters at the best resolution, ``silhouette_label``, ``knn_accuracy``,
      ``logreg_accuracy`` and ``logreg_macro_f1`` (5-fold), and their mean ``bio``;
    - with ``batch_key``, ``silhouette_batch``, ``graph_connectivity``, ``batch_mixing`` and their mean ``batch``;
    - ``overall``, which is ``0.6 bio + 0.4 batch``, or ``bio`` without batches;
    - with ``reference``, ``transfer_from_reference`` (accuracy of labels that the other batches get from the
      reference) and ``transfer_to_reference`` (the reverse), which do not count in ``overall``.

    Writes
    ------
    ``adata.uns["scllm"]["benchmark"]``
        ``params`` and the same ``table``; with ``reference``, also ``transfer``, a table with both accuracies for each
        embedding and each reference.

    Examples
    --------
    >>> import scllm
    >>> adata = scllm.datasets.toy(n_cells=200)
    >>> table = scllm.tl.benchmark(adata, use_rep="X_pca", key="cell_type")
    >>> bool(table.loc["X_pca", "logreg_accuracy"] > 0.9)
    True
    """
    check_adata(adata)
    names = [use_rep] if isinstance(use_rep, str) else list(use_rep)
    classes = labels(adata.obs, key)
    batches = None if batch_key is None else groups(adata.obs, batch_key)
    cells = _scored_cells(classes, batches, key)
    scored_classes = classes[cells].cat.remove_unused_categories()
    scored_batches = None if batches is None else batches[cells].cat.remove_unused_categories()
    _check_classes(scored_classes, scored_batches, key, batch_key)
    references = _references(reference, scored_batches, batch_key)
    for name in _trained_on(adata, names, key):
        log.warning(
            "obsm[%r] was computed with a model that was fine-tuned on a column %r. If it was trained on the labels of "
            "these cells, its scores are too high. Embed with the pretrained model, or score held-out cells.",
            name,
            key,
        )
    _warn_of_seen(adata, names, adata.obs[cells])
    embeddings = {name: _embedding(adata, name) for name in dict.fromkeys(names)}
    truth = scored_classes.cat.codes.to_numpy()
    origin = None if scored_batches is None else scored_batches.cat.codes.to_numpy()
    n_steps = len(embeddings) * (_N_STEPS if origin is None else _N_STEPS + 1)
    rows: dict[str, dict[str, float]] = {name: {} for name in embeddings}
    for name, scores in progress(_scored(embeddings, cells, truth, origin), desc="scoring", total=n_steps):
        rows[name] |= scores
    rows = {name: _with_means(row) for name, row in rows.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("embedding")
    params = {"use_rep": names, "key": key, "batch_key": batch_key, "reference": reference, "n_cells": int(cells.sum())}
    transfer = None
    if scored_batches is not None and references:
        scored = {name: values[cells] for name, values in embeddings.items()}
        transfer = _transfers(scored, truth, scored_batches.to_numpy(), references)
        table = table.join(transfer.groupby("embedding")[list(metrics.TRANSFER_METRICS)].mean())
    record(adata, "benchmark", params, table, transfer=transfer)
    return table


def _trained_on(adata: AnnData, names: Sequence[str], key: str) -> list[str]:
    """Return the embeddings whose model was fine-tuned on a column with this name."""
    heads = adata.uns.get(_keys.UNS, {}).get("embed", {}).get("heads")
    if heads is None:
        return []
    tuned = heads.loc[heads["head"] == key, "embedding"].astype(str)
    return [name for name in dict.fromkeys(names) if name in set(tuned)]


def _warn_of_seen(adata: AnnData, names: Sequence[str], obs: pd.DataFrame) -> None:
    """Warn of each embedding whose model was trained on the data sets or donors of the cells."""
    ledger = adata.uns.get(_keys.UNS, {}).get("embed", {}).get("trained_on")
    for name in dict.fromkeys(names) if ledger is not None else ():
        warn_of_seen(ledger[ledger["embedding"] == name], obs, what=f"the model of obsm[{name!r}]")


def _scored_cells(classes: pd.Series, batches: pd.Series | None, key: str) -> NDArray[np.bool_]:
    """Return which cells have a label, a batch and enough cells of their class; warn about the others."""
    known = classes.notna().to_numpy()
    if batches is not None:
        known &= batches.notna().to_numpy()
    sizes = classes[known].value_counts()
    small = sizes.index[(sizes > 0) & (sizes < _N_FOLDS)]
    cells = known & ~classes.isin(small).to_numpy()
    if not known.all():
        warn(
            f"{(~known).sum()} of {len(known)} cells have no label in obs[{key!r}], or no batch, and are not scored. "
            "Subset adata to the labelled cells to silence this warning."
        )
    if len(small):
        warn(
            f"Classes of obs[{key!r}] with fewer than {_N_FOLDS} cells are not scored, because they cannot be in every "
            f"fold: {listed(small)}. Subset adata, or merge small classes, to silence this warning."
        )
    return cells


def _check_classes(classes: pd.Series, batches: pd.Series | None, key: str, batch_key: str | None) -> None:
    if len(classes.cat.categories) < 2:
        raise ValueError(
            f"Expected at least 2 classes of {_N_FOLDS} cells or more in obs[{key!r}], got "
            f"{len(classes.cat.categories)}. Pass a column with coarser labels with `key=`."
        )
    if batches is not None and len(batches.cat.categories) < 2:
        raise ValueError(
            f"Expected at least 2 batches in obs[{batch_key!r}] among the labelled cells, got one "
            f"({batches.cat.categories[0]!r}). Leave `batch_key` out to score without batches."
        )


def _references(reference: str | Literal[True] | None, batches: pd.Series | None, batch_key: str | None) -> list[str]:
    """Return the batches that are references in turn; none without ``reference``."""
    if reference is None:
        return []
    if batches is None:
        raise TypeError(
            f"Expected batch_key= with reference={reference!r}, which is a batch of that column. Pass both, or leave "
            "reference out."
        )
    names = batches.cat.categories.tolist()
    if reference is True or reference == "each":
        return names
    if str(reference) not in names:
        raise missing_key(
            reference, names, f"a batch of obs[{batch_key!r}] among the scored cells", "Pass one of these, or 'each'."
        )
    return [str(reference)]


def _transfers(
    embeddings: Mapping[str, FloatArray], truth: IntArray, batch: NDArray[np.object_], references: Sequence[str]
) -> pd.DataFrame:
    """Transfer labels between each reference and all other batches in each embedding."""
    pairs = [(name, reference) for name in embeddings for reference in references]
    rows = []
    for name, reference in progress(pairs, desc="transferring labels", total=len(pairs)):
        inside = batch == reference
        known, others = (embeddings[name][inside], truth[inside]), (embeddings[name][~inside], truth[~inside])
        accuracies = [metrics.label_transfer(*known, *others), metrics.label_transfer(*others, *known)]
        rows.append([name, reference, *accuracies])
    return pd.DataFrame(rows, columns=["embedding", "reference", *metrics.TRANSFER_METRICS])


def _embedding(adata: AnnData, name: str) -> FloatArray:
    if name == _keys.PCA and name not in adata.obsm:
        return _pca(adata)
    return embedding(adata, name, advice="scllm.tl.embed(adata, model) writes 'X_scllm'.")


def _pca(adata: AnnData) -> FloatArray:
    """Compute principal components of log-normalised expression, ``(n_cells, 50)``."""
    import scanpy as sc

    if _keys.COUNTS in adata.layers:
        expression = AnnData(adata.layers[_keys.COUNTS].copy())
    elif adata.X is not None:
        expression = AnnData(adata.X[:] if adata.isbacked else adata.X.copy())
    else:
        raise ValueError(
            "Expected adata to have X or a layer 'counts', from which 'X_pca' is computed, got neither. Set adata.X, "
            "or leave 'X_pca' out of use_rep=."
        )
    if not is_log_like(expression.X):
        sc.pp.normalize_total(expression, target_sum=1e4)
        sc.pp.log1p(expression)
    n_comps = min(_N_COMPONENTS, min(expression.shape) - 1)
    sc.pp.pca(expression, n_comps=n_comps, random_state=0)
    return expression.obsm[_keys.PCA]


def _scored(
    embeddings: dict[str, FloatArray], cells: NDArray[np.bool_], truth: IntArray, origin: IntArray | None
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the scores of each embedding, a few at a time, with its name."""
    for name, values in embeddings.items():
        log.info("scoring %s: %d cells, %d dimensions", name, cells.sum(), values.shape[1])
        for scores in _scores(values if cells.all() else values[cells], truth, origin):
            yield name, scores


def _scores(values: FloatArray, truth: IntArray, origin: IntArray | None) -> Iterator[dict[str, float]]:
    """Yield all scores of an embedding, one step of the progress bar at a time."""
    graph, nearest = _neighbors(values)
    yield {"knn_accuracy": metrics.knn_accuracy(nearest, truth)}
    nmi, ari = metrics.clustering_agreement(_leiden(graph), truth)
    yield {"nmi": nmi, "ari": ari}
    yield {"silhouette_label": metrics.silhouette_label(values, truth)}
    probe = metrics.logistic_regression_scores(values, truth, n_folds=_N_FOLDS)
    yield {"logreg_accuracy": probe["accuracy"], "logreg_macro_f1": probe["macro_f1"]}
    if origin is not None:
        yield {
            "silhouette_batch": metrics.silhouette_batch(values, truth, origin),
            "graph_connectivity": metrics.graph_connectivity(graph, truth),
            "batch_mixing": metrics.batch_mixing(nearest, origin),
        }


def _with_means(scores: dict[str, float]) -> dict[str, float]:
    """Return one row of the table: scores in order, and their means."""
    row = {name: scores[name] for name in metrics.BIO_METRICS}
    row["bio"] = float(np.mean(list(row.values())))
    if not scores.keys() & set(metrics.BATCH_METRICS):
        return {**row, "overall": row["bio"]}
    of_batches = {name: scores[name] for name in metrics.BATCH_METRICS}
    # a score is NaN if no class is in more than one batch
    row |= {**of_batches, "batch": float(np.nanmean(list(of_batches.values())))}
    row["overall"] = metrics.BIO_WEIGHT * row["bio"] + (1 - metrics.BIO_WEIGHT) * row["batch"]
    return row


def _neighbors(values: FloatArray) -> tuple[CSR, CSR]:
    """Search neighbours once; return connectivities and the distances to the nearest cells, without the cell itself."""
    import scanpy as sc

    cells = AnnData(obsm={"values": values})
    n_neighbors = min(_N_NEIGHBORS, len(values) - 1)
    # approximate from 8,192 cells, by pynndescent
    sc.pp.neighbors(cells, n_neighbors=n_neighbors, use_rep="values", random_state=0)
    found = cells.obsp["distances"].tocoo()
    others = found.row != found.col
    nearest = (found.data[others], (found.row[others], found.col[others]))
    return cells.obsp["connectivities"], sparse.csr_matrix(nearest, shape=found.shape)


def _leiden(connectivities: CSR) -> Iterator[list[int]]:
    """Yield the Leiden clusters of one graph at each resolution."""
    import igraph

    edges = sparse.triu(connectivities, k=1, format="coo")
    graph = igraph.Graph(n=edges.shape[0], edges=np.column_stack([edges.row, edges.col]))
    options = {"objective_function": "modularity", "weights": edges.data, "n_iterations": 2}
    try:
        for resolution in _RESOLUTIONS:
            igraph.set_random_number_generator(random.Random(0))
            yield graph.community_leiden(resolution=resolution, **options).membership
    finally:
        igraph.set_random_number_generator(random)
