"""What verbs ask of their data before anything long starts."""

from __future__ import annotations

from anndata import AnnData

from scllm.data.checks import check_source
from scllm.data.source import CellSource, open_source
from scllm.models.base import CellModel

__all__ = ["check_layer"]


def check_layer(source: CellSource, model: CellModel, layer: str | None, adata: AnnData | None) -> None:
    """Raise on values that the model's encoder cannot read; name the layer that holds counts, if one does."""
    check_source(source, needs_counts=model.encoder.needs_counts, layer=layer, hint=_layer_with_counts(adata))


def _layer_with_counts(adata: AnnData | None) -> str:
    if adata is None:
        return ""
    for name in adata.layers:
        try:
            check_source(open_source(adata, layer=name), needs_counts=True, layer=name)
        except ValueError:
            continue
        return f"Layer {name!r} holds counts: pass layer={name!r}."
    return ""
