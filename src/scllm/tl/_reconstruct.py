"""Predict expression from the rest of the cell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from scllm import _keys
from scllm._checks import check_adata
from scllm._results import free_key, record, record_name
from scllm._typing import CSR, FloatArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.data.opened import closes_files
from scllm.data.source import open_source, places_in_source
from scllm.engine.objectives.masks import drawn_share
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve

__all__ = ["reconstruct"]


@closes_files
def reconstruct(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    mask_ratio: float | None = None,
    genes: Sequence[str] | None = None,
    target_depth: float | None = None,
    layer: str | None = None,
    key_added: str = _keys.RECONSTRUCTED,
    random_state: int = 0,
    copy: bool = False,
) -> AnnData | pd.DataFrame | None:
    """Predict expression, in the units that the model reads.

    scgpt predicts bins, scbert predicts levels (the mean of the predicted distribution), and scfoundation predicts
    ``log1p(count / total * 1e4)``. geneformer reads no values: for each gene, the predicted probability of its token at
    its position is written.

    Parameters
    ----------
    adata
        Cells by genes.
    model
        A model or its path. ``None``: the model last recorded on ``adata``.
    mask_ratio
        Fraction of each cell's genes to mask. Only masked genes are predicted, so that the predictions can be scored.
        ``None``: nothing is masked, and all genes that the model reads are predicted.
    genes
        Genes to predict in every cell, expressed or not; the predictions are returned as a table. scgpt predicts them
        from the cell embedding.
    target_depth
        Total counts per cell for which expression is predicted, as if the cell had been sequenced to that depth. Only
        for families that read the depth (scfoundation: read-depth enhancement). ``None``: the depth set in the model's
        encoder.
    layer
        Layer to read. ``None``: ``X``. ``"raw"``: ``adata.raw``. Only genes of ``adata`` are written.
    key_added
        Layer to write.
    random_state
        Seed for drawing the masked genes; has no effect without ``mask_ratio``.
    copy
        Return a changed copy instead of changing ``adata``.

    Returns
    -------
    With ``genes``, a DataFrame of cells by genes; otherwise ``None`` or the changed copy.

    Writes
    ------
    ``adata.layers[key_added]``
        Predictions (CSR, float32), for expressed genes that the model read or, with ``mask_ratio``, that were masked.
        Columns that share a token are read as their sum, and get the same prediction if they are expressed.
    ``adata.layers[key_added + "_target"]``
        Targets of these predictions, in the same unit: the model's bins, levels or values. Not written for models that
        read no values, or with ``target_depth``.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.reconstruct(adata, model, mask_ratio=0.5)
    >>> adata.layers["reconstructed"].shape == adata.shape
    True
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "layers", key_added)
    chosen = resolve(model, adata)
    if target_depth is not None and not chosen.reads_depth:
        raise ValueError(
            f"Expected a model that reads the sequencing depth with target_depth={target_depth}, got a {chosen.family} "
            "model. Leave target_depth out."
        )
    if target_depth is not None and not target_depth > 0:
        raise ValueError(f"Expected target_depth to be a positive number of counts, got {target_depth}. Try 10_000.")
    if mask_ratio is not None and not 0 < mask_ratio < 1:
        raise ValueError(f"Expected mask_ratio to be between 0 and 1, got {mask_ratio}. Leave it out to mask nothing.")
    if genes is not None and mask_ratio is not None:
        raise TypeError(
            f"Expected genes= or mask_ratio={mask_ratio}, got both: chosen genes are predicted without masking. Leave "
            "one out."
        )
    if genes is not None and (copy or key_added != _keys.RECONSTRUCTED):
        given = "copy=True" if copy else f"key_added={key_added!r}"
        raise TypeError(
            f"Expected genes= or {given}, got both: predictions of chosen genes are returned as a table and not "
            "written to adata. Leave one out."
        )
    source = open_source(adata, layer=layer)
    check_layer(source, chosen, layer, adata)
    match = gene_match(adata, source, chosen)
    if genes is not None:
        return _of_genes(chosen, source, match, [genes] if isinstance(genes, str) else list(genes), target_depth)
    places = places_in_source(adata, source)
    layers = _of_sequence(chosen, source, match, mask_ratio, target_depth, random_state)
    adata = adata.copy() if copy else adata
    adata.layers.pop(key + _keys.TARGET, None)  # of an earlier call
    for name, found in zip((key, key + _keys.TARGET), layers, strict=False):
        adata.layers[name] = found if places is None else found[:, places].sorted_indices()
    params = {
        "mask_ratio": mask_ratio,
        "target_depth": target_depth,
        "layer": layer,
        "key_added": key,
        "random_state": random_state,
    }
    record_name(adata, "layers", key_added)
    record(adata, "reconstruct", params)
    remember(adata, chosen)
    return adata if copy else None


def _of_sequence(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    mask_ratio: float | None,
    target_depth: float | None,
    seed: int,
) -> list[CSR]:
    """Predict the genes in each cell's token sequence; also return the targets if the model reads values."""

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        if target_depth is not None:
            batch = replica.at_depth(batch, target_depth)
        # token sequences of some families also contain genes that are not expressed
        at = drawn_share(batch, replica.is_expressed(batch), 1.0 if mask_ratio is None else mask_ratio)
        found = [batch.cell[at], batch.genes[at], replica.reconstruct(batch, at, hide=mask_ratio is not None)]
        if batch.values is not None and target_depth is None:
            found.append(batch.values[at])
        return torch.stack([part.double() for part in found], dim=1)

    blocks = []
    for cells, found in predict(model, source, match, forward, random_state=seed, desc="reconstructing"):
        blocks.append(_in_columns(source.read(cells), match, found.numpy()))
    return [sparse.vstack(parts, format="csr", dtype=np.float32) for parts in zip(*blocks, strict=True)]


def _in_columns(counts: CSR, match: GeneMatch, found: FloatArray) -> list[CSR]:
    """Move predictions ``(n, 2 + ...)``, whose first columns are cell and token, to the genes that the cell expresses.

    Genes that share a token get the same values, which are those of their sum.
    """
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    n_tokens = int(match.token_ids.max()) + 1
    asked = rows * n_tokens + match.token_ids[counts.indices]
    known = found[:, 0].astype(np.int64) * n_tokens + found[:, 1].astype(np.int64)
    order = np.argsort(known)
    at = np.searchsorted(known, asked, sorter=order).clip(max=max(0, len(known) - 1))
    place = order[at] if len(known) else np.zeros(len(asked), np.int64)
    is_found = (counts.data > 0) & (match.token_ids[counts.indices] >= 0)
    is_found &= known[place] == asked if len(known) else False
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[is_found], minlength=counts.shape[0]))])
    return [
        sparse.csr_matrix((values[place[is_found]], counts.indices[is_found], indptr), shape=counts.shape)
        for values in found[:, 2:].T
    ]


def _of_genes(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    names: list[str],
    target_depth: float | None,
) -> pd.DataFrame:
    """Predict the chosen genes in all cells; the table is dense, but has only those genes."""
    place = source.genes.get_indexer(names)
    ids = match.token_ids[place]
    missing = [name for name, i, token in zip(names, place, ids, strict=True) if i < 0 or token < 0]
    if missing:
        raise KeyError(
            f"Expected genes that are in the data and in the model's vocabulary, got {len(missing)} of {len(names)} "
            f"that are not (first: {missing[0]!r}). Leave them out."
        )
    wanted = torch.from_numpy(ids.astype(np.int64))

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        if target_depth is not None:
            batch = replica.at_depth(batch, target_depth)
        return replica.reconstruct_genes(batch, wanted.to(batch.genes.device))

    found = [values for _, values in predict(model, source, match, forward, desc="reconstructing")]
    return pd.DataFrame(torch.cat(found).numpy(), index=source.obs_names, columns=names)
