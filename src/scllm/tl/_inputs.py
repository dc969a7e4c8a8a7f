"""What verbs ask of their data before anything long starts."""

from __future__ import annotations

from anndata import AnnData

from scllm.data.checks import check_source, layer_with_counts
from scllm.data.source import CellSource
from scllm.models.base import CellModel

__all__ = ["check_layer"]


def check_layer(
    source: CellSource, model: CellModel, layer: str | None, adata: AnnData | None, *, downsample: float = 0.0
) -> None:
    """Raise on values that encoder or down-sampling cannot read; name the layer that holds counts, if one does."""
    needs_counts = model.encoder.needs_counts or downsample > 0
    check_source(source, needs_counts=needs_counts, layer=layer, hint=lambda: layer_with_counts(adata))
