"""Check the input data of verbs before any long computation starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scllm.data.cells import CellSource
from scllm.data.checks import check_source, layer_with_counts
from scllm.data.encode import RankEncoder
from scllm.data.genecorpus import RankedCells
from scllm.models.base import CellModel

__all__ = ["check_layer", "take_medians"]


def check_layer(
    source: CellSource,
    model: CellModel,
    layer: str | None,
    data: object,
    *,
    downsample: float = 0.0,
) -> None:
    """Raise on values that the encoder or count downsampling cannot read, and say which layer holds counts."""
    if not model.reads_expression:
        raise ValueError(
            f"Expected a model that reads expression, got a {model.family} model, which reads image features. Use "
            "tl.fit_spatial and tl.predict_spatial, or pass a model of another family."
        )
    if isinstance(source, RankedCells):
        _check_ranked(source, model)
    needs_counts = model.encoder.needs_counts or downsample > 0
    check_source(source, needs_counts=needs_counts, layer=layer, hint=lambda: layer_with_counts(data, layer))


def take_medians(source: CellSource, model: CellModel) -> None:
    """Give a new rank-based model the gene medians with which the token sequences were made."""
    encoder = model.encoder
    if isinstance(source, RankedCells) and isinstance(encoder, RankEncoder) and encoder.medians is None:
        medians = dict(zip(source.vocab.tokens, source.medians, strict=True))
        model.encoder = replace(encoder, medians=np.array([medians.get(token, np.nan) for token in model.vocab.tokens]))


def _check_ranked(source: RankedCells, model: CellModel) -> None:
    """Raise unless the model ranks genes as the token sequences do."""
    if not isinstance(model.encoder, RankEncoder):
        raise ValueError(
            f"{source.path} holds only the order of genes, but {model.family} reads expression values. Pass the "
            "counts, or a model that ranks genes (geneformer)."
        )
    medians = np.ones(len(model.vocab)) if model.encoder.medians is None else model.encoder.medians
    ids = model.vocab.ids(source.vocab.tokens)
    known = (ids >= 0) & np.isfinite(source.medians)
    if not np.allclose(medians[ids[known]], source.medians[known], rtol=1e-9, equal_nan=True):
        raise ValueError(
            f"Expected the gene medians of {source.path} to equal those of the model, got different ones, which would "
            "order genes differently. Write the folder again with `scllm genecorpus --model`."
        )
