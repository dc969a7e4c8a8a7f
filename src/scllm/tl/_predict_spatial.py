"""Predict expression from histology with a trained predictor."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from anndata import AnnData

from scllm import _keys
from scllm._checks import check_adata
from scllm._names import listed
from scllm._results import free_key, record, record_name
from scllm.data.opened import closes_files
from scllm.engine.device import resolve_device
from scllm.engine.spots import Spots, spot_features
from scllm.models.spatial import Model
from scllm.tl._model import ModelLike, remember, resolve
from scllm.tl._spatial_inputs import image_inputs, neighbours

__all__ = ["predict_spatial"]


@closes_files
def predict_spatial(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    key_added: str = _keys.PREDICTED,
    library_key: str | None = None,
    batch_size: int = 256,
    device: str = "auto",
    copy: bool = False,
) -> AnnData | None:
    """Predict the expression of spots from the histology image around them.

    Parameters
    ----------
    adata
        Spots with ``obsm["spatial"]`` and the image features that the predictor was trained on.
    model
        A predictor of :func:`fit_spatial` or its path. ``None``: the model last recorded on ``adata``.
    key_added
        Layer to write.
    library_key
        Column of ``obs`` that names the section of each spot. ``None``: the column whose values are the keys of
        ``uns["spatial"]``, or one section if it has at most one key.
    batch_size
        Number of spots per forward pass; changes only speed and memory.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.layers[key_added]``
        Predicted expression, float32, ``(n_spots, n_genes)``: log-normalised, or like the values that the predictor was
        trained on. NaN for genes that it does not predict.
    ``adata.uns["scllm"]["predict_spatial"]``
        ``params``.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=1, side=8)
    >>> model = scllm.tl.fit_spatial(adata, use_rep="programmes", epochs=1)
    >>> scllm.tl.predict_spatial(adata, model, key_added="expression")
    >>> adata.layers["expression"].dtype
    dtype('float32')
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "layers", key_added)
    chosen = resolve(model, adata)
    if not isinstance(chosen, Model):
        raise ValueError(f"Expected a model of tl.fit_spatial, got a {chosen.family} model. Pass the predictor.")
    columns = adata.var_names.get_indexer(list(chosen.vocab.genes))
    if (columns < 0).any():
        missing = np.asarray(chosen.vocab.genes)[columns < 0]
        raise ValueError(
            f"Expected the {len(columns)} predicted genes in adata.var_names, but {len(missing)} are missing "
            f"({listed(map(str, missing))}). Add them as empty columns, or rename genes as in the training data."
        )
    config, where = chosen.config, resolve_device(device)
    advice = (
        "Compute the features that the predictor was trained on, such as with "
        f"scllm.tl.embed_patches(adata, key_added={config.use_rep!r})."
    )
    features, reader = image_inputs(adata, config.use_rep, advice=advice)
    if features is not None and features.shape[1] != config.d_features:
        raise ValueError(
            f"Expected {config.d_features} features per spot in obsm[{config.use_rep!r}], as in training, got "
            f"{features.shape[1]}. Compute them with the same encoder."
        )
    near = neighbours(adata, config.n_neighbors, library_key)
    empty = np.empty(0, np.int64)
    spots = Spots(features, reader, near, cast(Any, None), None, empty)
    predicted = np.full((adata.n_obs, adata.n_vars), np.nan, np.float32)
    replica = deepcopy(chosen).to(where).eval()
    with torch.no_grad():
        for start in range(0, adata.n_obs, batch_size):
            rows = np.arange(start, min(start + batch_size, adata.n_obs))
            found = replica.expression(*spot_features(replica, spots, rows, where))
            predicted[rows[:, None], columns] = found.cpu().numpy()

    adata = adata.copy() if copy else adata
    adata.layers[key] = predicted
    record_name(adata, "layers", key_added)
    record(adata, "predict_spatial", {"key_added": key, "library_key": library_key})
    remember(adata, chosen)
    return adata if copy else None
