"""Reading rows of a count matrix from memory, ``.h5ad``, ``.zarr`` or memory-mapped arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, write_elem
from scipy import sparse

from scllm._checks import missing_key
from scllm._log import log
from scllm._names import listed
from scllm._results import storable_table
from scllm._typing import CSR, IntArray, Rows
from scllm.data.anndata_file import AnnDataFile, FileTables, MemoryTables, Tables, is_array
from scllm.data.genecorpus import RankedCells, is_genecorpus
from scllm.data.mapped import MappedRows, TransposedRows, write_rows
from scllm.data.storage import DenseRows, MemoryRows, RowStore, SelectedRows, SparseRows, positions
from scllm.kernels.ragged import take_rows

__all__ = [
    "RAW", "CellSource", "ConcatenatedCells", "GeneTables", "StoredCells", "gene_tables", "has_layer", "layer_names",
    "open_source", "places_in_source", "write_arrays",
]  # fmt: skip

# the layer that stands for ``.raw``, unless a layer of this name is there
RAW = "raw"
_RAW_X, _RAW_VAR = "raw/X", "raw/var"

# this file of a folder of memory-mapped arrays is written last: if it exists, the folder is complete
_TABLES = "cells.h5ad"


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
        """Read columns of ``obs``, indexed by the names of the cells."""
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


def open_source(data: AnnData | str | os.PathLike | Sequence | CellSource, *, layer: str | None = None) -> CellSource:
    """Open a matrix of cells by genes for reading by rows, without loading data on disk.

    Parameters
    ----------
    data
        One of the following:

        - an ``AnnData``, which may be backed or a view;
        - a path to ``.h5ad`` or ``.zarr``, or a folder of such files, which are read in the order of their names;
        - a folder from :func:`write_arrays`, or of rank-ordered token sequences (``scllm genecorpus``);
        - a list of any of these. The source has the union of their genes, in the order in which they first appear. A
          gene that a file did not measure does not count as zero in its cells (:func:`gene_tables`);
        - a source, which is returned unchanged.
    layer
        Layer that holds the matrix; ``None`` is ``X``. ``"raw"`` is ``raw.X`` with the genes of ``raw.var``, unless
        there is a layer of that name.

    Returns
    -------
    The source. Its files stay open until it is deleted.

    Examples
    --------
    >>> adata = AnnData(np.eye(3, dtype="float32"))
    >>> open_source(adata).read(np.array([2, 0])).toarray()
    array([[0., 0., 1.],
           [1., 0., 0.]], dtype=float32)
    """
    match data:
        case AnnData():
            return _open_adata(data, layer)
        case str() | os.PathLike():
            return _open_path(Path(data), layer)
        case StoredCells() | ConcatenatedCells() | CellSource():
            if layer not in (None, data.layer):
                raise ValueError(
                    f"Expected layer {data.layer!r}, on which this source was opened, got {layer!r}. A source has one "
                    "matrix: pass `layer=` where the source is opened."
                )
            return data
        case Sequence() if len(data):
            return ConcatenatedCells([open_source(part, layer=layer) for part in data])
    raise TypeError(
        "Expected data to be an AnnData, a path to .h5ad or .zarr, a folder, or a list of one or more of these, got "
        f"{type(data).__name__}. The data come first, the model second; data in another format can be written with "
        "`adata.write_h5ad`."
    )


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
    if (folder / _TABLES).exists():
        raise FileExistsError(f"Expected a new folder, but '{folder}' already holds a source. Remove it or open it.")
    folder.mkdir(parents=True, exist_ok=True)
    cells = positions(slice(None) if rows is None else rows, source.n_obs)
    write_rows((source.read(cells[start : start + chunk]) for start in range(0, max(1, len(cells)), chunk)), folder)
    with h5py.File(folder / "cells.partial", "w") as file:
        write_elem(file, "obs", storable_table(source.obs(list(obs)).iloc[cells]))
        write_elem(file, "var", storable_table(_naming_columns(source.var, gene_key)))
        if source.layer is not None:
            file.attrs["layer"] = source.layer
        _write_gene_tables(file, gene_tables(source), cells, gene_key)
    os.replace(folder / "cells.partial", folder / _TABLES)
    return folder


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
    def lengths(self) -> IntArray | None:
        """Number of values stored for each cell; ``None`` if it is not known without reading them."""
        return getattr(self._store, "lengths", None)

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
        self.parts = list(parts)
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
                n_lacking, len(self.genes),
            )  # fmt: skip
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
        return pd.DataFrame(united, index=tables[0].index.append([table.index for table in tables[1:]]))

    def close(self) -> None:
        """Close the parts."""
        for part in self.parts:
            if isinstance(part, StoredCells | ConcatenatedCells):
                part.close()


def layer_names(data: object) -> list[str | None]:
    """List the values of ``layer`` that ``open_source`` accepts: ``None`` for X, layers, and ``"raw"`` for ``.raw``.

    For several files or AnnData, list those that all of them have; for other data, only ``None``.
    """
    match data:
        case AnnData():
            return [*([] if data.X is None else [None]), *data.layers, *_raw_of(data.raw is not None, data.layers)]
        case str() | os.PathLike():
            found = [_matrices_in(AnnDataFile(file)) for file in _files(Path(data))]
        case list() | tuple():
            found = [layer_names(part) for part in data]
        case _:
            return [None]
    return [name for name in found[0] if all(name in other for other in found[1:])] if found else [None]


def has_layer(data: object, layer: str) -> bool:
    """Whether an AnnData has a layer of this name; otherwise ``"raw"`` stands for ``.raw``."""
    return isinstance(data, AnnData) and layer in data.layers


def places_in_source(adata: AnnData, source: CellSource) -> IntArray | None:
    """Find the column of the source for each gene of ``adata``, to write a layer; ``None`` if the genes are the same.

    They differ if ``.raw`` is read. A gene that is missing from ``.raw`` is an error: a layer would say that it was
    measured as zero.
    """
    if source.genes.equals(adata.var_names):
        return None
    places = source.genes.get_indexer(adata.var_names)
    lacking = adata.var_names[places < 0]
    if len(lacking):
        raise ValueError(
            f"Expected adata.raw to hold all {adata.n_vars} genes of adata, but {len(lacking)} are not in it "
            f"({listed(lacking)}). Leave them out: adata[:, adata.var_names.isin(adata.raw.var_names)]."
        )
    return places


def _open_adata(adata: AnnData, layer: str | None) -> StoredCells:
    """Open an AnnData; for a view, the matrix of the parent is read instead of copying the view."""
    parent = adata._adata_ref if adata.is_view else adata
    rows = np.arange(parent.n_obs)[adata._oidx] if adata.is_view else None
    if _reads_raw(parent, layer):
        # .raw always has the genes of the parent, even in a view of some genes
        raw = parent.raw
        store = _open_rows(AnnDataFile(Path(adata.filename)), _RAW_X) if adata.isbacked else MemoryRows(_by_rows(raw.X))
        store = store if rows is None else SelectedRows(store, rows, None)
        return StoredCells(store, MemoryTables(adata.obs, raw.var), name="adata", layer=layer)
    columns = np.arange(parent.n_vars)[adata._vidx] if adata.is_view else None
    if columns is not None and np.array_equal(columns, np.arange(parent.n_vars)):
        columns = None  # all genes in their order
    if layer is not None and layer not in parent.layers:
        raise KeyError(_no_layer(layer, layer_names(parent), "adata"))
    if adata.isbacked and layer is None:
        store = _open_rows(AnnDataFile(Path(adata.filename)), "X")
    else:
        matrix = parent.X if layer is None else parent.layers[layer]
        if adata.is_view and sparse.issparse(matrix) and matrix.format != "csr":
            # its rows cannot be read without conversion, and copying the view takes less than converting the parent
            matrix, rows, columns = (adata.X if layer is None else adata.layers[layer]), None, None
        store = MemoryRows(_by_rows(matrix))
    if rows is not None:
        store = SelectedRows(store, rows, columns)
    return StoredCells(store, MemoryTables(adata.obs, adata.var), name="adata", layer=layer)


def _reads_raw(adata: AnnData, layer: str | None) -> bool:
    """Whether ``layer`` stands for ``.raw``; a layer that is really called "raw" takes precedence."""
    if layer != RAW or adata.raw is None:
        return False
    if RAW in adata.layers:
        log.info("reading the layer 'raw' instead of adata.raw")
    return RAW not in adata.layers


def _by_rows(matrix: Any) -> Any:
    if matrix is None:
        raise KeyError(
            "Expected a matrix in adata.X, but it is None. Pass the layer that holds the counts with `layer=`."
        )
    if isinstance(matrix, np.ndarray):
        return np.asarray(matrix)
    if not sparse.issparse(matrix):
        raise TypeError(
            "Expected the matrix to be a numpy array or a scipy sparse matrix, got "
            f"{type(matrix).__module__}.{type(matrix).__name__}. Pass the path of its file, which is read row by row, "
            "or load it with `adata.to_memory()`."
        )
    if matrix.format != "csr":
        log.info("converting the matrix from %s to CSR", matrix.format.upper())
    return matrix.tocsr()


def _open_path(path: Path, layer: str | None) -> CellSource:
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a path to .h5ad or .zarr, or a folder of such files, but '{path}' does not exist. Check the "
            f"path; the current directory is '{Path.cwd()}'."
        )
    if (path / _TABLES).exists():
        return _open_arrays(path, layer)
    if is_genecorpus(path):
        return RankedCells(path)
    files = _files(path)
    if files == [path]:
        return _open_file(path, layer)
    if not files:
        raise FileNotFoundError(
            f"Expected .h5ad or .zarr files in '{path}', or a complete folder from `write_arrays`, got "
            f"{listed([file.name for file in path.iterdir()])}. Pass the folder that holds the data."
        )
    return ConcatenatedCells([_open_file(file, layer) for file in files])


def _open_file(path: Path, layer: str | None) -> StoredCells:
    if path.is_file() and not h5py.is_hdf5(path):
        raise ValueError(
            f"Expected an .h5ad file written by anndata, but '{path}' is not an HDF5 file. If it was copied or "
            "downloaded, check whether it is complete."
        )
    file = AnnDataFile(path)
    for table in ("obs", "var"):
        if table not in file.root or "_index" not in file.root[table].attrs:
            raise ValueError(
                f"Expected a table {table!r} as written by anndata 0.7 or newer, but '{path}' has none. "
                "Read the file with `anndata.read_h5ad`, write it again and pass the new file."
            )
    key = _key(file, layer)
    tables = FileTables(file, var=_RAW_VAR if key == _RAW_X else "var")
    return StoredCells(_open_rows(file, key), tables, name=f"'{path}'", layer=layer)


def _open_arrays(folder: Path, layer: str | None) -> StoredCells:
    file = AnnDataFile(folder / _TABLES)
    written = file.root.attrs.get("layer")
    if layer not in (None, written):
        raise KeyError(_no_layer(layer, [] if written is None else [written], f"'{folder}'"))
    tables = FileTables(file)
    measured = _read_gene_tables(file.root["gene_tables"]) if "gene_tables" in file.root else None
    rows = MappedRows(folder.absolute(), len(tables.var))
    return StoredCells(rows, tables, name=f"'{folder}'", layer=written, genes=measured)


def _key(file: AnnDataFile, layer: str | None) -> str:
    """Find the path of a layer within the file."""
    if layer is None:
        return "X"
    names = _matrices_in(file)
    if layer in _layers_in(file):
        if layer == RAW and _RAW_X in file.root:
            log.info("reading the layer 'raw' of '%s' instead of its .raw", file.path)
        return f"layers/{layer}"
    if layer not in names:
        raise KeyError(_no_layer(layer, names, f"'{file.path}'"))
    return _RAW_X


def _layers_in(file: AnnDataFile) -> list[str]:
    return list(file.root["layers"]) if "layers" in file.root else []


def _matrices_in(file: AnnDataFile) -> list[str | None]:
    """List X (``None``) if there is one, the layers, and ``"raw"`` if it stands for ``.raw``."""
    layers = _layers_in(file)
    has_x = "X" in file.root and file.root["X"].attrs.get("encoding-type") != "null"
    return [*([None] if has_x else []), *layers, *_raw_of(_RAW_X in file.root, layers)]


def _raw_of(has_raw: bool, layers: Iterable[str]) -> list[str]:
    return [RAW] if has_raw and RAW not in layers else []


def _open_rows(file: AnnDataFile, key: str) -> RowStore:
    node = file.root[key] if key in file.root else None
    kind = "null" if node is None else node.attrs.get("encoding-type")
    match kind:
        case "csr_matrix":
            return SparseRows(file, key)
        case "csc_matrix":
            return TransposedRows(file, key)
        case "array" | None if is_array(node):  # anndata 0.7 did not store the type of dense matrices
            return DenseRows(file, key)
        case "null" if key == "X":
            raise KeyError(
                f"Expected a matrix X in '{file.path}'. Pass one of {_listed(_matrices_in(file))} as `layer=`."
            )
    seen = repr(kind) if kind is not None else "a group without 'encoding-type' (anndata before 0.7)"
    raise TypeError(
        f"Expected a CSR, CSC or dense matrix, but {key!r} in '{file.path}' is stored as {seen}. "
        "Read the file with anndata, convert the matrix and write it again."
    )


def _files(path: Path) -> list[Path]:
    """List the AnnData files of a path: the path itself, or the files in a folder."""
    if path.is_file() or (path / "zarr.json").exists() or (path / ".zgroup").exists():
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix in (".h5ad", ".zarr")) if path.is_dir() else []


def _no_layer(layer: str, names: Sequence[str | None], name: str) -> str:
    raw = "" if RAW in names else ", and it has no .raw"
    return (
        f"Expected layer {layer!r} in {name}, but its layers are {_listed(names)}{raw}. Pass one of them, or "
        "`layer=None` for X."
    )


def _listed(names: Sequence[str | None]) -> str:
    return listed([name for name in names if name is not None])


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
