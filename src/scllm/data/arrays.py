"""Folders of memory-mapped arrays, which many processes share and read in any order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem, write_elem

from scllm._results import storable_table
from scllm._typing import IntArray, Rows
from scllm.data.anndata_file import AnnDataFile, FileTables
from scllm.data.cells import CellSource, GeneTables, StoredCells, gene_tables
from scllm.data.mapped import MappedRows, write_rows
from scllm.data.storage import positions

__all__ = ["is_folder_of_arrays", "open_arrays", "write_arrays"]

# written last: if this file exists, the folder is complete
_TABLES = "cells.h5ad"


def write_arrays(
    source: CellSource,
    path: str | os.PathLike,
    *,
    obs: Sequence[str] = (),
    gene_key: str | None = None,
    rows: Rows | None = None,
    chunk: int = 4096,
) -> Path:
    """Write a source as memory-mapped arrays, which many processes can share and read in any order.

    Parameters
    ----------
    source
        What to write.
    path
        Folder to create. It is an error if it already holds a complete copy.
    obs
        Columns of ``obs`` to keep. The names of cells and genes are always kept, as plain strings.
    gene_key
        Column of ``var`` to keep, whatever its type. Columns of text are always kept, as they may name the genes.
    rows
        Cells to write, in this order; ``None`` writes all.
    chunk
        Number of cells held in memory at a time.

    Returns
    -------
    The folder, for :func:`open_source`. It records the name of the layer.
    """
    folder = Path(path)
    if is_folder_of_arrays(folder):
        raise FileExistsError(f"Expected a new folder, but '{folder}' already holds a source. Remove it or open it.")
    folder.mkdir(parents=True, exist_ok=True)
    cells = positions(slice(None) if rows is None else rows, source.n_obs)
    write_rows((source.read(cells[start : start + chunk]) for start in range(0, max(1, len(cells)), chunk)), folder)
    with h5py.File(folder / "cells.partial", "w") as file:
        named = source.obs(list(obs)).set_axis(source.obs_names)
        write_elem(file, "obs", storable_table(named.iloc[cells]))
        write_elem(file, "var", storable_table(_naming_columns(source.var, gene_key)))
        if source.layer is not None:
            file.attrs["layer"] = source.layer
        _write_gene_tables(file, gene_tables(source), cells, gene_key)
    os.replace(folder / "cells.partial", folder / _TABLES)
    return folder


def is_folder_of_arrays(folder: Path) -> bool:
    """Whether a folder holds a complete copy written by :func:`write_arrays`."""
    return (folder / _TABLES).exists()


def open_arrays(folder: Path) -> StoredCells:
    """Open a folder written by :func:`write_arrays`; the source has the layer that was written."""
    file = AnnDataFile(folder / _TABLES)
    tables = FileTables(file)
    measured = _read_gene_tables(file.root["gene_tables"]) if "gene_tables" in file.root else None
    rows = MappedRows(folder.absolute(), len(tables.var))
    layer = file.root.attrs.get("layer")
    return StoredCells(rows, tables, name=f"'{folder}'", layer=layer, genes=measured)


def _naming_columns(var: pd.DataFrame, gene_key: str | None) -> pd.DataFrame:
    """The columns of a table of genes that can name them."""
    return var.loc[:, [name == gene_key or _is_text(column) for name, column in var.items()]]


def _is_text(column: pd.Series) -> bool:
    values = column.cat.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    return pd.api.types.infer_dtype(np.asarray(values, dtype=object), skipna=True) == "string"


def _write_gene_tables(file: h5py.File, found: GeneTables, cells: IntArray, gene_key: str | None) -> None:
    """Store which genes each cell's file measured, if files differ in that."""
    if len(found.tables) == 1:
        return
    group = file.create_group("gene_tables")
    group["of_cell"] = found.of_cell[cells]
    for i, (name, table) in enumerate(zip(found.names, found.tables, strict=True)):
        write_elem(group, str(i), storable_table(_naming_columns(table, gene_key)))
        group[str(i)].attrs["name"] = name


def _read_gene_tables(group: h5py.Group) -> GeneTables:
    keys = [str(i) for i in range(len(group) - 1)]
    names = tuple(str(group[key].attrs["name"]) for key in keys)
    return GeneTables(names, tuple(read_elem(group[key]) for key in keys), group["of_cell"][:])
