"""What verbs ask of their data before anything long starts."""

from __future__ import annotations

import warnings

from anndata import AnnData

from scllm.data.checks import check_source
from scllm.data.source import CellSource, open_source
from scllm.models.base import CellModel

__all__ = ["check_layer"]


def check_layer(
    source: CellSource,
    model: CellModel,
    layer: str | None,
    adata: AnnData | None,
    *,
    downsample: float = 0.0,
    takes_layer: bool = True,
) -> None:
    """Raise on values that encoder or down-sampling cannot read; name the layer that holds counts, if one does."""
    needs_counts = model.encoder.needs_counts or downsample > 0
    check_source(source, needs_counts=needs_counts, layer=layer, hint=lambda: _layer_with_counts(adata, takes_layer))


def _layer_with_counts(adata: AnnData | None, takes_layer: bool) -> str:
    if adata is None:
        return ""
    for name in adata.layers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of non-integers: they are no counts
                check_source(open_source(adata, layer=name), needs_counts=True, layer=name)
        except (ValueError, UserWarning):
            continue
        advice = f"pass layer={name!r}" if takes_layer else f"put it into X (adata.X = adata.layers[{name!r}])"
        return f"Layer {name!r} holds counts: {advice}."
    return "" if takes_layer else "Put raw counts into X."
