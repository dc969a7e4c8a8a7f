"""Predict labels and values with a fine-tuned model."""

from __future__ import annotations

from numbers import Real

import numpy as np
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

__all__ = ["classify", "columns_of_heads"]


@closes_files()
def classify(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    key_added: str = _keys.LABEL,
    threshold: float | None = None,
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
    threshold
        Cells whose most probable label has a lower probability become ``"unknown"`` if labels are strings, and missing
        if they are integers or booleans. Heads are often confident about cells of an unseen type: to find those, take
        0.9 rather than 0.5, and test the threshold on a held-out type.
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
    ``adata.obsm[key_added + "_probabilities"]``
        Probability of each class, float32 ``(n_cells, n_classes)``.
    ``adata.uns["scllm"]["classify"]``
        Settings and the names of the classes: ``classes``, or ``classes_<key>`` with several heads.
    ``adata.uns["scllm"]["probabilities"]``
        ``table`` of the classes of all columns with probabilities, from all functions that write them.

    Examples
    --------
    >>> scllm.tl.classify(adata, tuned)  # doctest: +SKIP
    """
    check_adata(adata, copy, key_added)
    chosen = resolve(model, adata)
    if not chosen.heads_on("cell"):
        path = f" in {chosen.path}" if chosen.path is not None else ""
        heads = "whose heads are on genes only" if chosen.head_specs else "without a head"
        raise ValueError(
            f"Expected a fine-tuned model with a head on cells, got a {chosen.family} model{path} {heads}. Fine-tune "
            "it first (tl.finetune, `scllm finetune`)."
        )
    if threshold is not None and not (isinstance(threshold, Real) and 0 <= threshold <= 1):
        raise ValueError(
            f"Expected threshold to be a probability from 0 to 1, got {threshold!r}. Leave it out to label every cell."
        )
    specs = [spec for spec in chosen.head_specs if spec.level == "cell"]
    if threshold is not None and all(spec.classes is None for spec in specs):
        raise TypeError(
            f"Expected a head that predicts labels with threshold={threshold}, got the head on {specs[0].key!r}, which "
            "predicts values. Leave threshold out."
        )
    for spec in specs:
        if threshold is not None and _keys.UNKNOWN in (spec.classes or ()) and _categories(spec).is_text:
            warn(
                f"{_keys.UNKNOWN!r} is a class of the head on {spec.key!r}, and threshold= gives the same label to "
                "uncertain cells: the two cannot be distinguished. Rename the class and fine-tune again."
            )
        if spec.classes is not None:
            label = "the label 'unknown'" if _categories(spec).is_text else "no label"
            advice = f"pass threshold= to give uncertain cells {label}"
            warn_of_unknown_labels(adata.obs, spec.key, spec.classes, advice)
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
    adata = adata.copy() if copy else adata
    edges = np.cumsum([spec.n_outputs for spec in specs])[:-1]
    classes: dict[str, NDArray[np.object_]] = {}
    for old in {*columns, *record_keys(adata, "obs", names, call=key_added)}:
        drop_labels(adata, old)
    for spec, column, output in zip(specs, columns, np.split(outputs, edges, axis=1), strict=True):
        _write(adata, spec, output, column, threshold)
        if spec.classes is not None:
            classes["classes" + column.removeprefix(_keys.safe(key_added))] = np.array(spec.classes, dtype=object)
            record_classes(adata, column, spec.classes)
    record(adata, "classify", {"key_added": _keys.safe(key_added), "threshold": threshold, "layer": layer}, **classes)
    remember(adata, chosen)
    return adata if copy else None


def columns_of_heads(model: CellModel, key_added: str) -> list[str]:
    """Return the column that each head on cells writes; several heads append their key."""
    return [_keys.safe(name) for name in _names_of_heads(model, key_added)]


def _names_of_heads(model: CellModel, key_added: str) -> list[str]:
    keys = model.heads_on("cell")
    return [f"{key_added}_{key}" for key in keys] if len(keys) > 1 else [key_added]


def _categories(spec: HeadSpec) -> Categories:
    """Return how the column that a head was trained on stored its labels."""
    return spec.categories or Categories(spec.classes or ())


def _write(adata: AnnData, spec: HeadSpec, output: FloatArray, key: str, threshold: float | None) -> None:
    if spec.classes is None:
        adata.obs[key] = (output[:, 0] * spec.std + spec.mean).astype(np.float32)
        return
    probabilities = torch.from_numpy(output / spec.temperature).softmax(1).numpy()
    best = probabilities.argmax(1)
    highest = probabilities[np.arange(len(best)), best]
    names, categories = np.array(spec.classes, dtype=object)[best], _categories(spec)
    if threshold is not None:
        names[highest < threshold] = _keys.UNKNOWN if categories.is_text else None
    adata.obs[key] = categories.column(
        names, also=[_keys.UNKNOWN] if threshold is not None and categories.is_text else []
    )
    adata.obs[key + _keys.PROBABILITY] = highest
    adata.obsm[key + _keys.PROBABILITIES] = probabilities
