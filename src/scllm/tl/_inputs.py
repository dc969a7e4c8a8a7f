"""What verbs ask of their data before anything long starts."""

from __future__ import annotations

import warnings

from anndata import AnnData

from scllm.data.checks import check_source
from scllm.data.source import CellSource, open_source
from scllm.models.base import CellModel

__all__ = ["check_layer"]


def check_layer(
    source: CellSource, model: CellModel, layer: str | None, adata: AnnData | None, *, downsample: float = 0.0
) -> None:
    """Raise on values that encoder or down-sampling cannot read; name the layer that holds counts, if one does."""
    needs_counts = model.encoder.needs_counts or downsample > 0
    check_source(source, needs_counts=needs_counts, layer=layer, hint=lambda: _layer_with_counts(adata))


def _layer_with_counts(adata: AnnData | None) -> str:
    if adata is None:
        return ""
    for name in adata.layers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of non-integers: they are no counts
                check_source(open_source(adata, layer=name), needs_counts=True, layer=name)
        except (ValueError, UserWarning):
            continue
        return f"Layer {name!r} holds counts: pass layer={name!r}."
    return ""
