"""Predict labels and values with a fine-tuned model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from scllm import _keys
from scllm._checks import check_adata, warn_of_unknown_labels
from scllm._labels import Categories
from scllm._log import warn
from scllm._results import drop_labels, free_key, record, record_classes, record_keys
from scllm._typing import FloatArray
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.config import Precision
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel, HeadSpec
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve
from scllm.tl._unknown import Cutoff, Unknown, cutoffs

__all__ = ["classify", "columns_of_heads"]


@closes_files
def classify(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    key_added: str = _keys.LABEL,
    unknown: Unknown | None = None,
    threshold: float | None = None,
    fpr: float | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Label cells with a fine-tuned model.

    Parameters
    ----------
    adata
        Cells by genes.
    model
        A model from :func:`finetune`, or its path. ``None``: the model last recorded on ``adata``.
    key_added
        Column to write; a model with several heads appends ``_<key>``. Results of an earlier call with the same
        ``key_added`` are removed.
    unknown
        How cells of types that the training cells lack are found. They become ``"unknown"`` if labels are strings, and
        missing if they are integers or booleans.

        - ``"probability"``: the most probable label has too low a probability. Heads are often confident about cells of
          an unseen type.
        - ``"distance"``: the cell is too far from the training cells. The distance is the Mahalanobis distance of the
          logits to the closest mean of a label, with one regularised covariance matrix for all labels (Lee et al. 2018,
          arXiv:1807.03888). Logits depend on the directions in which labels differ, and not on depth, donor and batch
          if these do not. Models that were fine-tuned by earlier versions lack it.

        ``None``: every cell gets a label, unless there is a ``threshold``. docs/unseen_types.md compares the two.
    threshold
        Lowest probability, or with ``unknown="distance"`` largest distance, of a cell of a known type. ``None``: the
        one of ``fpr``.
    fpr
        False-positive rate: share of the cells of known types that may become unknown. The threshold is chosen for it
        on the validation cells of :func:`finetune`, so the rate holds for cells like these; hold out whole donors with
        ``group_key=`` to choose it for new donors. ``None``: 0.05.
    layer
        Layer to read. ``None``: ``X``.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: the column of an earlier
        :func:`scllm.pp.match_genes`, otherwise the one that matches most genes.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: the value of an earlier
        :func:`scllm.pp.match_genes`, otherwise 0.3.
    batch_size
        Number of cells per forward pass; changes only speed and memory.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    precision
        ``"auto"``: fp32 on a CPU, bf16 on a GPU that supports it.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.obs[key_added]``, ``adata.obs[key_added + "_prob"]``
        Label and its probability. Labels are categorical, with the categories of the column that the head was trained
        on, in the same type and order. A head that predicts values writes float32 and no probability.
    ``adata.obs[key_added + "_distance"]``
        With ``unknown="distance"``: distance to the training cells, float32.
    ``adata.obsm[key_added + "_probabilities"]``
        Probability of each class, float32 ``(n_cells, n_classes)``.
    ``adata.uns["scllm"]["classify"]``
        Settings and the names of the classes: ``classes``, or ``classes_<key>`` with several heads. If cells may be
        unknown, also a ``table`` with the threshold and the number of unknown cells of each column.
    ``adata.uns["scllm"]["probabilities"]``
        ``table`` of the classes of all columns with probabilities, from all functions that write them.

    Examples
    --------
    >>> scllm.tl.classify(adata, tuned)  # doctest: +SKIP
    >>> scllm.tl.classify(adata, tuned, unknown="distance", fpr=0.05)  # doctest: +SKIP
    """
    check_adata(adata, copy, key_added)
    chosen = resolve(model, adata)
    specs = _specs(chosen)
    limits = cutoffs(chosen, specs, unknown, threshold, fpr)
    _warn_of_labels(adata, specs, is_limited=bool(limits))
    names = _names_of_heads(chosen, key_added)
    columns = [free_key(adata, "obs", name) for name in names]
    source = open_source(adata, layer=layer)
    check_layer(source, chosen, layer, adata)
    match = gene_match(adata, source, chosen, gene_key, min_coverage)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        outputs = replica.head_outputs(batch)
        return torch.cat([outputs[spec.key].float() for spec in specs], dim=1)

    results = predict(
        chosen, source, match, forward, batch_size=batch_size, device=device, precision=precision, desc="classifying"
    )
    outputs = torch.cat([values for _, values in results]).numpy()
    edges = np.cumsum([spec.n_outputs for spec in specs])[:-1]
    adata = adata.copy() if copy else adata
    classes: dict[str, NDArray[np.object_]] = {}
    called = []
    for old in {*columns, *record_keys(adata, "obs", names, call=key_added)}:
        drop_labels(adata, old)
    for spec, column, output in zip(specs, columns, np.split(outputs, edges, axis=1), strict=True):
        limit = limits.get(spec.key)
        is_far = limit is not None and limit.score == "distance"
        distance = chosen.known_cells[spec.key].distances(output) if is_far else None
        n_unknown = _write(adata, spec, output, column, limit, distance)
        if spec.classes is not None:
            classes["classes" + column.removeprefix(_keys.safe(key_added))] = np.array(spec.classes, dtype=object)
            record_classes(adata, column, spec.classes)
        if limit is not None:
            called.append([column, limit.score, limit.value, n_unknown])
    params = {
        "key_added": _keys.safe(key_added),
        "unknown": unknown,
        "threshold": threshold,
        "fpr": fpr,
        "layer": layer,
    }
    table = pd.DataFrame(called, columns=["column", "score", "threshold", "n_unknown"]) if called else None
    record(adata, "classify", params, table, **classes)
    remember(adata, chosen)
    return adata if copy else None


def _specs(model: CellModel) -> list[HeadSpec]:
    """Return the heads on cells; raise if there are none."""
    specs = [spec for spec in model.head_specs if spec.level == "cell"]
    if not specs:
        path = f" in {model.path}" if model.path is not None else ""
        heads = "whose heads are on genes only" if model.head_specs else "without a head"
        raise ValueError(
            f"Expected a fine-tuned model with a head on cells, got a {model.family} model{path} {heads}. Fine-tune "
            "it first (tl.finetune, `scllm finetune`)."
        )
    return specs


def _warn_of_labels(adata: AnnData, specs: Sequence[HeadSpec], *, is_limited: bool) -> None:
    """Warn of a class called "unknown", and of labels that cells have already and the model cannot predict."""
    for spec in specs:
        if spec.classes is None:
            continue
        is_text = _categories(spec).is_text
        if is_limited and _keys.UNKNOWN in spec.classes and is_text:
            warn(
                f"{_keys.UNKNOWN!r} is a class of the head on {spec.key!r}, and threshold= or unknown= gives the same "
                "label to other cells: the two cannot be distinguished. Rename the class and fine-tune again."
            )
        if not is_limited:
            label = "the label 'unknown'" if is_text else "no label"
            advice = f"pass unknown= or threshold= to give uncertain cells {label}"
            warn_of_unknown_labels(adata.obs, spec.key, spec.classes, advice)


def columns_of_heads(model: CellModel, key_added: str) -> list[str]:
    """Return the column that each head on cells writes; several heads append their key."""
    return [_keys.safe(name) for name in _names_of_heads(model, key_added)]


def _names_of_heads(model: CellModel, key_added: str) -> list[str]:
    keys = model.heads_on("cell")
    return [f"{key_added}_{key}" for key in keys] if len(keys) > 1 else [key_added]


def _categories(spec: HeadSpec) -> Categories:
    """Return how the column that a head was trained on stored its labels."""
    return spec.categories or Categories(spec.classes or ())


def _write(
    adata: AnnData, spec: HeadSpec, output: FloatArray, key: str, limit: Cutoff | None, distance: FloatArray | None
) -> int:
    """Write the results of a head; return the number of unknown cells."""
    if spec.classes is None:
        adata.obs[key] = (output[:, 0] * spec.std + spec.mean).astype(np.float32)
        return 0
    probabilities = torch.from_numpy(output / spec.temperature).softmax(1).numpy()
    best = probabilities.argmax(1)
    highest = probabilities[np.arange(len(best)), best]
    names, categories = np.array(spec.classes, dtype=object)[best], _categories(spec)
    is_unknown = np.zeros(len(best), bool)
    if limit is not None:
        is_unknown = limit.is_unknown(highest if distance is None else distance)
        names[is_unknown] = _keys.UNKNOWN if categories.is_text else None
    adata.obs[key] = categories.column(names, also=[_keys.UNKNOWN] if limit is not None and categories.is_text else [])
    adata.obs[key + _keys.PROBABILITY] = highest
    if distance is not None:
        adata.obs[key + _keys.DISTANCE] = distance
    adata.obsm[key + _keys.PROBABILITIES] = probabilities
    return int(is_unknown.sum())
