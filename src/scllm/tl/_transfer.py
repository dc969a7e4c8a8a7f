"""Transfer labels from a reference to the cells closest to it in an embedding."""

from __future__ import annotations

from numbers import Integral
from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.neighbors import KNeighborsClassifier

from scllm import _keys
from scllm._checks import check_adata, embedding, labels, warn_of_unknown_labels
from scllm._labels import Categories
from scllm._log import warn
from scllm._results import drop_labels, free_key, record, record_classes, record_name
from scllm._typing import FloatArray
from scllm.tl._unknown import FPR, Cutoff, check_unknown, cutoff_at

__all__ = ["transfer_labels"]

# cells of the reference whose neighbours are searched to choose the threshold
_MAX_CELLS = 10_000


def transfer_labels(
    adata: AnnData,
    reference: AnnData,
    *,
    key: str,
    use_rep: str = _keys.EMBEDDING,
    n_neighbors: int = 10,
    unknown: Literal["distance"] | None = None,
    threshold: float | None = None,
    fpr: float | None = None,
    key_added: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Label cells by their nearest neighbours in a labelled reference.

    This needs no training, only embeddings of both data sets by the same model. It is a quick first annotation, and a
    baseline for :func:`classify`. A cell whose type is not in the reference gets the label of the closest type, unless
    ``unknown="distance"`` finds it.

    Parameters
    ----------
    adata
        Cells to label, embedded.
    reference
        Labelled cells, embedded by the same model. Cells without a label are ignored.
    key
        Column of ``reference.obs`` with labels.
    use_rep
        Key of the embedding in ``obsm`` of both; distances are Euclidean.
    n_neighbors
        Number of neighbours that vote. The weight of a vote is the inverse of the distance.
    unknown
        ``"distance"``: cells that are too far from the reference become ``"unknown"`` if labels are strings, and
        missing if they are integers or booleans. The distance is that to the last of the ``n_neighbors`` neighbours
        (Sun et al. 2022, arXiv:2204.06507). ``None``: every cell gets a label.
    threshold
        With ``unknown="distance"``: largest distance of a cell of a known type. ``None``: the one of ``fpr``.
    fpr
        False-positive rate: share of the cells of known types that may become unknown. The threshold is chosen for it
        on the distances of the cells of the reference from the others of the reference. It therefore holds for cells
        like these, and more cells of another study become unknown if the embedding differs between studies. ``None``:
        0.05.
    key_added
        Column to write. ``None``: ``key + "_transferred"``.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.obs[key_added]``, ``adata.obs[key_added + "_prob"]``
        Label and its fraction of the weighted votes. Labels are categorical, with the categories of the reference, in
        the same type and order.
    ``adata.obs[key_added + "_distance"]``
        With ``unknown="distance"``: distance to the last of the neighbours, float32.
    ``adata.obsm[key_added + "_probabilities"]``
        Fraction of the weighted votes for each class, float32 ``(n_cells, n_classes)``.
    ``adata.uns["scllm"]["transfer_labels"]``
        Settings and the names of the classes; with ``unknown="distance"``, also a ``table`` with the threshold and the
        number of unknown cells.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=200)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.embed(adata, model)
    >>> query, reference = adata[:50].copy(), adata[50:].copy()
    >>> scllm.tl.transfer_labels(query, reference, key="cell_type")
    >>> query.obs["cell_type_transferred"].cat.categories.to_list()
    ['alpha', 'beta', 'delta', 'gamma']
    """
    name = f"{key}{_keys.TRANSFERRED}" if key_added is None else key_added
    check_adata(adata, copy, name)
    column = free_key(adata, "obs", name)
    if unknown is None and threshold is not None:
        raise TypeError(f"threshold={threshold!r} needs unknown='distance'. Pass both, or leave threshold out.")
    check_unknown(unknown, threshold, fpr, ("distance",))
    if not isinstance(reference, AnnData):
        raise TypeError(
            f"Expected reference to be an AnnData, got a {type(reference).__name__}. Read files with anndata.read_h5ad."
        )
    classes = labels(reference.obs, key, owner="reference")
    categories = Categories.of(reference.obs[key])
    known, new = _embeddings(adata, reference, use_rep)
    codes = classes.cat.codes.to_numpy()
    labelled = np.flatnonzero(codes >= 0)
    # a cell of the reference is not its own neighbour
    _check_n_neighbors(n_neighbors, len(labelled) - (unknown is not None), key, len(labelled))
    if unknown is None:
        advice = (
            f"obs[{column + _keys.PROBABILITY!r}] tells how certain each label is, and unknown='distance' finds them"
        )
        warn_of_unknown_labels(adata.obs, key, classes.cat.categories, advice)
    voters = KNeighborsClassifier(n_neighbors, weights="distance").fit(known[labelled], codes[labelled])
    votes = voters.predict_proba(new)
    limit = None if unknown is None else _cutoff(voters, known[labelled], threshold, FPR if fpr is None else fpr)
    adata = adata.copy() if copy else adata
    record_name(adata, "obs", name)
    drop_labels(adata, column)
    found = classes.cat.categories.to_numpy(dtype=object)[votes.argmax(axis=1)]
    table: pd.DataFrame | None = None
    also: list[str] = []
    if limit is not None:
        distance = voters.kneighbors(new)[0][:, -1]
        is_unknown = limit.is_unknown(distance)
        found[is_unknown] = _keys.UNKNOWN if categories.is_text else None
        also = [_keys.UNKNOWN] if categories.is_text else []
        row = [column, limit.score, limit.value, int(is_unknown.sum())]
        table = pd.DataFrame([row], columns=["column", "score", "threshold", "n_unknown"])
        adata.obs[column + _keys.DISTANCE] = distance.astype(np.float32)
    adata.obs[column] = categories.column(found, also=also)
    adata.obs[column + _keys.PROBABILITY] = votes.max(axis=1).astype(np.float32)
    adata.obsm[column + _keys.PROBABILITIES] = votes.astype(np.float32)
    params = {"key": key, "use_rep": use_rep, "n_neighbors": n_neighbors, "key_added": column}
    params |= {"unknown": unknown, "threshold": threshold, "fpr": fpr}
    record_classes(adata, column, classes.cat.categories)
    record(adata, "transfer_labels", params, table, classes=classes.cat.categories.to_numpy(dtype=object))
    return adata if copy else None


def _check_n_neighbors(n_neighbors: object, most: int, key: str, n_labelled: int) -> None:
    is_whole = isinstance(n_neighbors, Integral) and not isinstance(n_neighbors, bool)
    if not is_whole or not 1 <= n_neighbors <= most:  # type: ignore[operator]
        raise ValueError(
            f"Expected n_neighbors to be a whole number from 1 to {most}, got {n_neighbors!r}: the reference "
            f"has {n_labelled} cells with a label in obs[{key!r}]. Pass a smaller number, or a larger reference."
        )


def _cutoff(voters: KNeighborsClassifier, known: FloatArray, threshold: float | None, fpr: float) -> Cutoff:
    """Return the largest distance of a cell of a known type, by default from distances within the reference."""
    if threshold is not None:
        return Cutoff("distance", float(threshold))
    if len(known) > _MAX_CELLS:
        known = known[np.random.default_rng(0).choice(len(known), _MAX_CELLS, replace=False)]
    # the first neighbour is the cell itself, or a copy of it at the same distance
    return Cutoff("distance", cutoff_at(voters.kneighbors(known, voters.n_neighbors + 1)[0][:, -1], fpr))


def _embeddings(adata: AnnData, reference: AnnData, use_rep: str) -> tuple[FloatArray, FloatArray]:
    """Return the embeddings of the reference and of the cells; raise or warn if they are of different models."""
    known = _embedding(reference, use_rep, "reference")
    new = _embedding(adata, use_rep, "adata")
    if known.shape[1] != new.shape[1]:
        raise ValueError(
            f"Expected obsm[{use_rep!r}] to have the same number of columns in adata and in the reference, got "
            f"{new.shape[1]} in adata and {known.shape[1]} in the reference. Embed both with the same model: "
            "tl.embed(adata, model), tl.embed(reference, model)."
        )
    ours, theirs = _model_of(adata, use_rep), _model_of(reference, use_rep)
    if ours is not None and theirs is not None and ours != theirs:
        warn(
            f"obsm[{use_rep!r}] was computed with model {ours} in adata and with model {theirs} in the reference. "
            "Distances between embeddings of different models are meaningless, and so are the labels. Embed both with "
            "the same model."
        )
    return known, new


def _model_of(data: AnnData, use_rep: str) -> str | None:
    """Return the hash of the model that ``tl.embed`` recorded for this embedding, if any."""
    models = data.uns.get(_keys.UNS, {}).get("embed", {}).get("models")
    found = [] if models is None else models.loc[models["embedding"] == use_rep, "hash"].tolist()
    return str(found[0]) if found else None


def _embedding(data: AnnData, use_rep: str, name: str) -> FloatArray:
    advice = f"Embed with scllm.tl.embed({name}, model, key_added={use_rep!r})."
    return embedding(data, use_rep, advice=advice, owner=name)
