"""Expression, image features and neighbours of the spots of an AnnData."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from anndata import AnnData

from scllm import _keys
from scllm._checks import embedding
from scllm._log import log
from scllm._names import listed
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.checks import check_source
from scllm.data.source import open_source
from scllm.data.spots import nearest_spots, sections_of, spot_positions
from scllm.tl._patches import patch_reader

__all__ = ["expression_source", "genes_to_predict", "image_inputs", "neighbours"]


def expression_source(adata: AnnData, layer: str | None) -> CellSource:
    """Open the expression of spots; raise on values that are negative or not finite."""
    source = open_source(adata, layer=layer)
    check_source(source, needs_counts=False, layer=layer)
    return source


def genes_to_predict(adata: AnnData, genes: Iterable[str] | None) -> list[str]:
    """Return the genes that were passed, or those that are spatially variable, or all."""
    if not adata.var_names.is_unique:
        double = adata.var_names[adata.var_names.duplicated()][0]
        raise ValueError(f"Expected each gene once, but {double!r} is there twice. Call adata.var_names_make_unique().")
    if genes is None:
        if _keys.SPATIALLY_VARIABLE not in adata.var:
            return list(map(str, adata.var_names))
        chosen = adata.var_names[adata.var[_keys.SPATIALLY_VARIABLE].to_numpy(bool)]
        log.info("predicting the %d genes in var['spatially_variable']", len(chosen))
        return list(map(str, chosen))
    names = [genes] if isinstance(genes, str) else list(map(str, genes))
    missing = [name for name in names if name not in adata.var_names]
    if missing or len(set(names)) < len(names) or not names:
        what = "some are there twice" if names else "got none"
        if missing:
            what = f"{len(missing)} are not ({listed(missing)})"
        raise ValueError(f"Expected genes to be different names of adata.var_names, but {what}. Correct genes=.")
    return names


_COMPUTE_FEATURES = "Call scllm.tl.embed_patches(adata) first, or pass the key of image features as use_rep=."


def image_inputs(
    adata: AnnData, use_rep: str | None, *, advice: str = _COMPUTE_FEATURES
) -> tuple[FloatArray | None, Any]:
    """Return the features of spots, or what reads the pixels of their patches."""
    if use_rep is None:
        return None, patch_reader(adata).hold()
    return np.ascontiguousarray(embedding(adata, use_rep, advice=advice), dtype=np.float32), None


def neighbours(adata: AnnData, k: int, library_key: str | None) -> IntArray:
    """Return the nearest spots of each spot within its section, ``(n, k)``."""
    if not k:
        return np.empty((adata.n_obs, 0), np.int64)
    section = sections_of(adata.obs, adata.uns.get(_keys.SPATIAL, {}), library_key)
    return nearest_spots(spot_positions(adata.obsm, adata.obs_names), section, k)
