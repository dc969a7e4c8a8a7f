"""Rows of a count matrix, in memory or on disk, and the tables that describe its cells and genes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from scipy import sparse

from scllm._checks import missing_key
from scllm._log import log
from scllm._typing import CSR, IntArray, Rows
from scllm.data.anndata_file import Tables
from scllm.data.storage import RowStore, positions
from scllm.kernels.ragged import take_rows

__all__ = ["CellSource", "ConcatenatedCells", "GeneTables", "StoredCells", "gene_tables"]


@runtime_checkable
class CellSource(Protocol):
    """Rows of a count matrix that may be in memory or on disk.

    ``chunked`` says whether single random rows are slow to read; chunks of about ``chunk_rows`` consecutive rows should
    be drawn then. A source of files with different genes also has ``gene_tables``, see :func:`gene_tables`.
    """

    n_obs: int
    genes: pd.Index
    var: pd.DataFrame
    layer: str | None
    chunked: bool
    chunk_rows: int

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells; read from the file each time."""
        ...

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of ``obs`` that :meth:`obs` can read."""
        ...

    def read(self, rows: Rows) -> CSR:
        """Read rows in the given order: positions (repeats are allowed), a slice or a mask.

        Values have the stored type. Columns are sorted and free of duplicates; stored zeros are kept.
        """
        ...

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns of ``obs``, without the names of the cells, which take more memory than most columns."""
        ...


@dataclass(frozen=True)
class GeneTables:
    """The genes that each cell's file measured.

    Parameters
    ----------
    names
        Name of the file of each table, for messages.
    tables
        ``var`` of each file, indexed by its genes. Files with equal tables share one.
    of_cell
        Index of the table of each cell, ``(n_obs,)``.
    """

    names: tuple[str, ...]
    tables: tuple[pd.DataFrame, ...]
    of_cell: IntArray


def gene_tables(source: CellSource) -> GeneTables:
    """Return the genes that each cell's file measured: one table, unless files with different tables are read."""
    found = getattr(source, "gene_tables", None)
    return found or GeneTables((_name(source),), (source.var,), np.zeros(source.n_obs, np.int32))


class StoredCells:
    """One matrix, with the tables that describe its cells and genes."""

    def __init__(
        self, store: RowStore, tables: Tables, *, name: str, layer: str | None, genes: GeneTables | None = None
    ) -> None:
        self._store, self._tables, self.name, self.layer, self.gene_tables = store, tables, name, layer, genes
        self.n_obs, self.chunked, self.chunk_rows = store.shape[0], store.chunked, store.chunk_rows
        self.var = tables.var
        self.genes = self.var.index

    def read(self, rows: Rows) -> CSR:
        """Read rows in the given order."""
        return self._store.read(positions(rows, self.n_obs))

    @property
    def path(self) -> Path | None:
        """The file or folder that holds the matrix; ``None`` for one in memory and for a view."""
        return getattr(self._store, "path", None)

    @property
    def stamp(self) -> str | None:
        """Digest of the state of a matrix at an address; ``None`` for any other, see ``path``."""
        return getattr(self._store, "stamp", None)

    @property
    def lengths(self) -> IntArray | None:
        """Number of values stored for each cell; ``None`` if it is not known without reading them."""
        return getattr(self._store, "lengths", None)

    @property
    def n_values(self) -> int | None:
        """Number of values of all cells, if it is known although ``lengths`` may not be."""
        return getattr(self._store, "n_values", None)

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        return self._tables.obs_names

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of ``obs``."""
        return self._tables.obs_columns

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns of ``obs``."""
        for column in columns:
            if column not in self.obs_columns:
                raise missing_key(str(column), self.obs_columns, f"a column of obs in {self.name}")
        return self._tables.obs(columns)

    def close(self) -> None:
        """Close files; a later read opens them again."""
        for part in (self._store, self._tables):
            if hasattr(part, "close"):
                part.close()


class ConcatenatedCells:
    """Several sources concatenated along the cells, over the union of their genes."""

    def __init__(self, parts: Sequence[CellSource]) -> None:
        # parts of parts, such as the files of a folder in a list, are parts
        self.parts: list[CellSource] = [one for part in parts for one in getattr(part, "parts", [part])]
        for part in self.parts:
            if not part.genes.is_unique:
                twice = part.genes[part.genes.duplicated()][0]
                raise ValueError(
                    f"Expected unique gene names to concatenate, but {twice!r} appears more than once in "
                    f"{_name(part)}. Call `adata.var_names_make_unique()` and write the file again."
                )
        var = pd.concat([part.var for part in self.parts])
        self.var: pd.DataFrame = var[~var.index.duplicated()]
        self.genes = self.var.index
        n_lacking = max(len(self.genes) - len(part.genes) for part in self.parts)
        if n_lacking:
            log.info(
                "reading files with different genes (up to %d of %d are missing from a file): each cell is read with "
                "the genes that its own file measured",
                n_lacking,
                len(self.genes),
            )
        self.gene_tables = _united_tables([gene_tables(part) for part in self.parts])
        self.layer = self.parts[0].layer
        self._columns = [self.genes.get_indexer(part.genes).astype(np.int32) for part in self.parts]
        self._ends = np.cumsum([part.n_obs for part in self.parts])
        self.n_obs = int(self._ends[-1])
        self.chunked = any(part.chunked for part in self.parts)
        self.chunk_rows = max(part.chunk_rows for part in self.parts)
        self._dtype = np.result_type(*(part.read(slice(0, 0)).dtype for part in self.parts))

    def read(self, rows: Rows) -> CSR:
        """Read rows in the given order."""
        cells = positions(rows, self.n_obs)
        owner = np.searchsorted(self._ends, cells, side="right")
        asked = [np.flatnonzero(owner == i) for i in range(len(self.parts))]
        blocks = [self._read_part(i, cells[places]) for i, places in enumerate(asked) if len(places)]
        if len(blocks) == 1:
            return blocks[0]
        empty = sparse.csr_matrix((0, len(self.genes)), dtype=self._dtype)
        stacked = sparse.vstack([empty, *blocks], format="csr")
        order = np.argsort(np.concatenate([*asked, np.empty(0, np.int64)]))
        indptr, indices, data = take_rows(stacked.indptr, order, stacked.indices, stacked.data)
        return sparse.csr_matrix((data, indices, indptr), shape=stacked.shape)

    def _read_part(self, i: int, cells: IntArray) -> CSR:
        start = self._ends[i] - self.parts[i].n_obs
        block = self.parts[i].read(cells - start)
        data, columns = block.data.astype(self._dtype, copy=False), self._columns[i][block.indices]
        renamed = sparse.csr_matrix((data, columns, block.indptr), shape=(len(cells), len(self.genes)))
        renamed.sort_indices()
        return renamed

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells, which are not made unique across the parts."""
        names = self.parts[0].obs_names
        return names.append([part.obs_names for part in self.parts[1:]])

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns of ``obs`` that are in all parts."""
        others = [set(part.obs_columns) for part in self.parts[1:]]
        return [column for column in self.parts[0].obs_columns if all(column in other for other in others)]

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns of ``obs``; categorical columns get the union of the categories."""
        tables = [part.obs(columns) for part in self.parts]
        united = {column: _united([table[column] for table in tables]) for column in columns}
        return pd.DataFrame(united, index=pd.RangeIndex(self.n_obs))

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            if isinstance(part, StoredCells | ConcatenatedCells):
                part.close()


def _united_tables(parts: list[GeneTables]) -> GeneTables:
    """Join the gene tables of several sources, keeping equal tables only once."""
    names: list[str] = []
    tables: list[pd.DataFrame] = []
    of_cell = []
    for part in parts:
        kinds = []
        for name, table in zip(part.names, part.tables, strict=True):
            kind = next((i for i, known in enumerate(tables) if known.equals(table)), len(tables))
            if kind == len(tables):
                names.append(name)
                tables.append(table)
            kinds.append(kind)
        of_cell.append(np.array(kinds, np.int32)[part.of_cell])
    return GeneTables(tuple(names), tuple(tables), np.concatenate(of_cell))


def _united(columns: list[pd.Series]) -> Any:
    """Concatenate columns; the result is categorical if all of them are."""
    if all(isinstance(column.dtype, pd.CategoricalDtype) for column in columns):
        if len({column.cat.categories.dtype for column in columns}) > 1:
            columns = [column.cat.rename_categories(column.cat.categories.map(str)) for column in columns]
        return pd.api.types.union_categoricals(columns, ignore_order=True)
    return pd.concat(columns).array


def _name(source: CellSource) -> str:
    return getattr(source, "name", type(source).__name__)
