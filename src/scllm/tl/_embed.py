"""Embed cells and genes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from os import PathLike, fspath
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from scllm import _keys
from scllm._checks import check_adata, groups
from scllm._log import log
from scllm._results import free_key, record, record_name
from scllm._typing import FloatArray, IntArray
from scllm.data.fingerprint import hash_match, source_stamp
from scllm.data.genes import GeneMatch
from scllm.data.opened import closes_files
from scllm.data.row_file import BLOCK, own_share, rows_when_whole
from scllm.data.source import open_source
from scllm.engine.config import Precision
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel, Pooling
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve
from scllm.tl._train import Data

__all__ = ["embed", "embed_genes"]


@closes_files
def embed(
    data: Data,
    model: ModelLike | None = None,
    *,
    pooling: Pooling | None = None,
    hidden_layer: int = -1,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    key_added: str = _keys.EMBEDDING,
    out: str | PathLike[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    n_gpus: int = 1,
    precision: Precision = "auto",
    copy: bool = False,
) -> AnnData | FloatArray | None:
    """Embed cells with a pretrained or fine-tuned model.

    The embedding of a cell depends only on the model and on the genes and counts of the cell. It does not depend on the
    order of the genes, on other cells or files, on the batch size or on the number of processes (in fp32, to 1e-5).
    Ties are broken by token id.

    Parameters
    ----------
    data
        An AnnData; a path to ``.h5ad``, ``.zarr``, a TileDB-SOMA (or its address) or a collection of annbatch; a list
        or a folder of those; or a source.
    model
        A model, or the path of a model or run directory. ``None``: the model last recorded on ``data``.
    pooling
        How the hidden states of a cell's tokens become one embedding. A family offers the values in
        ``model.poolings``:

        - ``"cls"``: the hidden state of ``<cls>``.
        - ``"mean"``, ``"max"``: mean or maximum over gene tokens.
        - ``"ranked"``: rank-weighted mean, in which highly expressed genes have larger weights; for cells of unequal
          depth.
        - ``"linear"``: linearly weighted mean; weights decrease to zero at the gene with the lowest expression.
        - ``"all"``: both depth tokens, maximum and mean (scfoundation).

        ``None``: the default of the family, which is ``<cls>`` scaled to unit length for scgpt, ``<cls>`` if the model
        has it and otherwise the mean for geneformer, ``"all"`` for scfoundation, and the mean for the others.
    hidden_layer
        Block whose output is pooled: -1 is the last block, -2 the one before it.
    layer
        Layer to read. ``None``: ``X``.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: the column of an earlier
        :func:`scllm.pp.match_genes`, otherwise the one that matches most genes.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: the value of an earlier
        :func:`scllm.pp.match_genes`, otherwise 0.3.
    key_added
        Key in ``obsm``.
    out
        A ``.zarr`` or ``.npy`` file to which the embedding of data given as a path is streamed. The file appears only
        when it is complete. Several processes share the cells if ``RANK`` and ``WORLD_SIZE`` are set, as torchrun does:
        each call embeds its own part, and the last to finish makes the file appear.
    batch_size
        Number of cells per forward pass; changes only speed and memory.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    n_gpus
        Number of GPUs that share the cells.
    precision
        ``"auto"``: fp32 on a CPU, bf16 on a GPU that supports it.
    copy
        Return a changed copy instead of changing ``data``.

    Returns
    -------
    For an AnnData, ``None`` or the changed copy; for a path, the embedding, or ``None`` if it was written to ``out``.

    Writes
    ------
    ``adata.obsm[key_added]``
        Embedding, float32 ``(n_cells, d)``.
    ``adata.uns["scllm"]["embed"]``
        Settings; ``models``, with one row for each key in ``obsm`` and the hash of its model; and, if a model with
        heads was used, ``heads``, with one row for each key in ``obsm`` and each column of ``obs`` that its model was
        fine-tuned on; and ``trained_on``, with the data sets and donors that the models were trained on, if known.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.embed(adata, model)
    >>> adata.obsm["X_scllm"].shape[1]
    64
    """
    adata = data if isinstance(data, AnnData) else None
    _check_destination(data, out, key_added, copy)
    chosen = resolve(model, adata)
    check_choice(chosen, pooling, hidden_layer)
    source = open_source(data, layer=layer)
    check_layer(source, chosen, layer, data)
    match = gene_match(data, source, chosen, gene_key, min_coverage)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        return replica.embed(batch, pooling=pooling, layer=hidden_layer)

    def run(rows: slice) -> Iterator[tuple[slice, Tensor]]:
        cells = np.arange(rows.start, rows.stop)
        return predict(
            chosen, source, match, forward, rows=cells, batch_size=batch_size, device=device, precision=precision,
            n_gpus=n_gpus,
        )  # fmt: skip

    if out is None:
        embedding = _collected(run(slice(0, source.n_obs)), source.n_obs)
    else:
        depends_on = [chosen.hash(), source_stamp(source), pooling, hidden_layer, layer, hash_match(match), precision]
        _stream(run, source.n_obs, Path(fspath(out)), repr(depends_on))
    if adata is None:
        return None if out is not None else embedding
    adata = adata.copy() if copy else adata
    key = _keys.safe(key_added)
    adata.obsm[key] = embedding
    record_name(adata, "obsm", key_added)
    params = {
        "pooling": pooling or chosen.pooling,
        "hidden_layer": hidden_layer,
        "layer": layer,
        "key_added": key,
        "heads": list(chosen.heads_on("cell")) or None,
    }
    remember(adata, chosen)
    written = adata.uns[_keys.UNS]["model"]["hash"]
    models = _of_all(adata, "models", key, pd.DataFrame({"hash": [written]}))
    heads = _of_all(adata, "heads", key, pd.DataFrame({"head": list(chosen.heads_on("cell"))}, dtype=object))
    trained_on = _of_all(adata, "trained_on", key, chosen.trained_on)
    record(adata, "embed", params, models=models, heads=heads, trained_on=trained_on)
    return adata if copy else None


def _check_destination(data: object, out: str | PathLike[str] | None, key_added: str, copy: bool) -> None:
    """Raise if the embedding cannot be written where the caller wants it."""
    adata = data if isinstance(data, AnnData) else None
    if adata is not None:
        check_adata(adata, copy, key_added)
        free_key(adata, "obsm", key_added)
    if adata is None and copy:
        raise TypeError(
            f"Expected data to be an AnnData with copy=True, got a {type(data).__name__}. Leave copy out: the "
            "embedding is returned, or written to the file given as out=."
        )
    if adata is not None and out is not None:
        raise TypeError(
            f"Expected data to be a path with out={str(out)!r}, got an AnnData. Remove out=: the embedding of an "
            "AnnData is written to its obsm."
        )
    if out is not None:
        _check_out(Path(fspath(out)), data)


def check_choice(model: CellModel, pooling: Pooling | None, hidden_layer: int) -> None:
    """Raise if the model has no such block or pooling."""
    if not -model.config.n_layers - 1 <= hidden_layer <= -1:
        raise ValueError(
            f"Expected hidden_layer to be from {-model.config.n_layers - 1} (input of the first block) to -1 (output "
            f"of the last block), got {hidden_layer}. Leave it out for the last block."
        )
    if pooling is not None and pooling not in model.poolings:
        raise ValueError(
            f"Expected pooling to be one of {', '.join(map(repr, model.poolings))} or None for this {model.family} "
            f"model, got {pooling!r}. Leave it out for the default of the family."
        )


def _of_all(adata: AnnData, name: str, key_added: str, table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Return a table of all embeddings, in which ``table`` replaces the rows of an earlier one with the same key."""
    earlier = adata.uns.get(_keys.UNS, {}).get("embed", {}).get(name)
    parts = [] if table is None else [table.assign(embedding=key_added)]
    parts += [] if earlier is None else [earlier[earlier["embedding"] != key_added]]
    parts = [part for part in parts if len(part)]
    if not parts:
        return None
    found = pd.concat(parts[::-1], ignore_index=True)
    return found[["embedding", *found.columns.drop("embedding")]]


@closes_files
def embed_genes(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    contextual: bool = False,
    groupby: str | None = None,
    layer: str | None = None,
    key_added: str = _keys.GENES,
    copy: bool = False,
) -> AnnData | None:
    """Embed genes with the model's input embeddings, or with hidden states averaged over the cells that express them.

    Parameters
    ----------
    adata
        Cells by genes.
    model
        A model or its path. ``None``: the model last recorded on ``adata``.
    contextual
        ``True``: the mean hidden state of the gene after the last block, over the cells that express it. ``False``:
        the input embedding, which is the same in all cells.
    groupby
        Column of ``obs`` with groups of cells. Contextual embeddings are averaged within each group.
    layer
        Layer to read. ``None``: ``X``. ``"raw"``: ``adata.raw``; genes that are not in ``adata.raw`` get NaN.
    key_added
        Key in ``varm``.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.varm[key_added]``
        Gene embeddings, float32 ``(n_genes, d)``, or ``(n_genes, n_groups, d)`` with ``groupby``. NaN for genes that
        are not in the model's vocabulary or that no cell expresses.
    ``adata.uns["scllm"]["embed_genes"]``
        Settings and, with ``groupby``, the names of the groups.

    Examples
    --------
    >>> adata = scllm.datasets.toy()
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.embed_genes(adata, model)
    >>> adata.varm["scllm_genes"].shape == (adata.n_vars, 64)
    True
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "varm", key_added)
    chosen = resolve(model, adata)
    source = open_source(adata, layer=layer)
    match = gene_match(adata, source, chosen)
    token_ids = match.of_genes(source.genes, adata.var_names)
    known = token_ids >= 0
    names: list[str] | None = None
    if groupby is None and not contextual:
        table = chosen.gene_table().detach().float().cpu().numpy()
        vectors = np.full((adata.n_vars, table.shape[1]), np.nan, np.float32)
        vectors[known] = table[token_ids[known]]
    else:
        check_layer(source, chosen, layer, adata)
        codes = np.zeros(adata.n_obs, np.int64)
        if groupby is not None:
            column = groups(adata.obs, groupby)
            names, codes = list(column.cat.categories), column.cat.codes.to_numpy().astype(np.int64)
        means = _contextual_means(chosen, source, match, codes, 1 if names is None else len(names))
        vectors = np.full((adata.n_vars, *means.shape[1:]), np.nan, np.float32)
        vectors[known] = means[_row_of_token(match, chosen)[token_ids[known]]]
        vectors = vectors[:, 0] if names is None else vectors
    adata = adata.copy() if copy else adata
    adata.varm[key] = vectors
    params = {"contextual": contextual or groupby is not None, "groupby": groupby, "layer": layer, "key_added": key}
    record_name(adata, "varm", key_added)
    record(adata, "embed_genes", params, None if names is None else pd.DataFrame({"group": names}))
    remember(adata, chosen)
    return adata if copy else None


def _contextual_means(model, source, match, codes, n_groups) -> FloatArray:
    """Return the mean hidden state of each measured token in the cells of each group, ``(n_measured, n_groups, d)``."""
    d, n_measured = model.config.d_model, len(match.measured)
    row = torch.from_numpy(_row_of_token(match, model))
    means = _Means(n_measured * n_groups, d)

    def forward(replica: CellModel, batch: Batch) -> Tensor:
        # token and cell are columns beside the hidden state, because forward returns one array
        expressed = replica.is_expressed(batch)
        ids = torch.stack([batch.genes, batch.cell], dim=1)[expressed].float()
        return torch.cat([ids, replica.hidden(batch)[expressed].float()], dim=1)

    for rows, found in predict(model, source, match, forward, desc="embedding genes in"):
        group = torch.from_numpy(codes[rows])[found[:, 1].long()]
        place = row[found[:, 0].long()] * n_groups + group
        means.add(place[group >= 0], found[group >= 0, 2:])
    return means.so_far().float().view(n_measured, n_groups, d).numpy()


class _Means:
    """Running means of vectors at each place. Counts are integers, because float32 stops counting at 16.7 million."""

    def __init__(self, n_places: int, d: int) -> None:
        self.total = torch.zeros(n_places, d, dtype=torch.float64)
        self.count = torch.zeros(n_places, dtype=torch.int64)

    def add(self, place: Tensor, vectors: Tensor) -> None:
        """Add vectors ``(n, d)``, given the place of each."""
        self.total.index_add_(0, place, vectors.double())
        self.count += torch.bincount(place, minlength=len(self.count))

    def so_far(self) -> Tensor:
        """Return the means so far, with NaN for places without a vector."""
        return self.total / self.count[:, None]


def _row_of_token(match: GeneMatch, model: CellModel) -> IntArray:
    """Return the index of each token among those measured in the data, ``(n_tokens,)``; -1 for others."""
    row = np.full(len(model.vocab), -1)
    row[match.measured] = np.arange(len(match.measured))
    return row


def _check_out(out: Path, data: object) -> None:
    """Raise if ``out`` cannot be written, or exists and is not an embedding."""
    if out.suffix not in (".zarr", ".npy"):
        raise ValueError(f"Expected out to be a path ending in .zarr or .npy, got {str(out)!r}. Rename it.")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"Expected out to be in an existing folder, got {str(out)!r}. Create the folder {str(out.parent)!r} first."
        )
    parts = data if isinstance(data, (list, tuple)) else [data]
    is_input = any(Path(part).absolute() == out.absolute() for part in parts if isinstance(part, (str, PathLike)))
    if is_input or (out.suffix == ".zarr" and (out / ".zgroup").exists()) or _is_group(out):
        raise ValueError(
            f"Expected out to be a new path or an embedding written earlier, got {str(out)!r}, which holds data. Pass "
            "another path."
        )


def _is_group(path: Path) -> bool:
    """Return whether a folder is a zarr group, such as an AnnData; an embedding is a single array."""
    file = path / "zarr.json"
    return file.is_file() and json.loads(file.read_text()).get("node_type") != "array"


def _collected(results: Iterator[tuple[slice, Tensor]], n_cells: int) -> FloatArray:
    """Collect all rows in an array in memory."""
    embedding = np.empty((0, 0), np.float32)
    for rows, values in _blocks(results):
        if not rows.start:
            embedding = np.empty((n_cells, values.shape[1]), np.float32)
        embedding[rows] = values
    return embedding


def _stream(run: Callable[[slice], Iterator[tuple[slice, Tensor]]], n_cells: int, out: Path, key: str) -> None:
    """Embed the cells that are the share of this process, and write them to a file that appears when it is complete."""
    share = own_share()
    rows = share.rows(n_cells)
    if share.world > 1:
        log.info(
            "embedding cells %d to %d, the share of process %d of %d; '%s' appears when all have finished",
            rows.start,
            rows.stop,
            share.rank,
            share.world,
            out,
        )
    with rows_when_whole(out, n_cells, share, key) as file:
        if file is None:
            log.info("keeping the rows that process %d has written before", share.rank)
            return
        for place, values in _blocks(run(rows)) if rows.stop > rows.start else ():
            file.write(rows.start + place.start, values)


def _blocks(results: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, FloatArray]]:
    """Combine the rows of many batches, so that each compressed chunk is written once and not once per batch."""
    parts: list[Tensor] = []
    start = stop = 0
    for rows, values in results:
        parts.append(values)
        stop = rows.stop
        if stop - start >= BLOCK:
            yield slice(start, stop), torch.cat(parts).numpy()
            parts, start = [], stop
    if parts:
        yield slice(start, stop), torch.cat(parts).numpy()
