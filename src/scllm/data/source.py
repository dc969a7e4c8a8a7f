"""Opening a matrix of cells by genes: AnnData, ``.h5ad``, ``.zarr``, TileDB-SOMA, folders, and lists of these."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata import AnnData
from scipy import sparse

from scllm._log import log
from scllm._names import listed
from scllm._typing import IntArray
from scllm.data.anndata_file import AnnDataFile, FileTables, MemoryTables, is_array
from scllm.data.arrays import is_folder_of_arrays, open_arrays
from scllm.data.cells import CellSource, ConcatenatedCells, StoredCells
from scllm.data.genecorpus import RankedCells, is_genecorpus
from scllm.data.mapped import TransposedRows
from scllm.data.soma import is_address, is_soma, open_soma, soma_layers
from scllm.data.storage import DenseRows, MemoryRows, RowStore, SelectedRows, SparseRows

__all__ = ["RAW", "files_in", "has_layer", "layer_names", "open_source", "places_in_source"]

# the layer that stands for ``.raw``, unless a layer of this name is there
RAW = "raw"
_RAW_X, _RAW_VAR = "raw/X", "raw/var"
# how annbatch names the groups of a collection; both kinds have been of version 0.1.0 so far
_COLLECTIONS, _DATASET = ("annbatch-preshuffled", "annbatch-grouped"), re.compile(r"dataset_(\d+)")


def open_source(data: AnnData | str | os.PathLike | Sequence | CellSource, *, layer: str | None = None) -> CellSource:
    """Open a matrix of cells by genes for reading by rows, without loading data on disk.

    Parameters
    ----------
    data
        One of the following:

        - an ``AnnData``, which may be backed or a view;
        - a path to ``.h5ad`` or ``.zarr``;
        - a TileDB-SOMA experiment, or a Census with one organism: a folder, or an address such as ``s3://...``, which
          needs the extra ``census``;
        - a collection of annbatch (``.zarr``);
        - a folder of any of these, which are read in the order of their names;
        - a folder from :func:`~scllm.data.arrays.write_arrays`;
        - a folder of rank-ordered token sequences (``scllm genecorpus``);
        - a list of any of these. The source has the union of their genes, in the order in which they first appear. A
          gene that a file did not measure does not count as zero in its cells (:func:`~scllm.data.cells.gene_tables`);
        - a source, which is returned unchanged.
    layer
        Layer that holds the matrix; ``None`` is ``X``. ``"raw"`` is ``raw.X`` with the genes of ``raw.var``, unless
        there is a layer of that name. In a TileDB-SOMA, the name of a matrix in ``X``, and ``None`` is ``"raw"``.

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
            return open_soma(data, layer=layer) if is_address(data) else _open_path(Path(data), layer)
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


def layer_names(data: object) -> list[str | None]:
    """List the values of ``layer`` that ``open_source`` accepts: ``None`` for X, layers, and ``"raw"`` for ``.raw``.

    For several files or AnnData, list those that all of them have; for other data, only ``None``.
    """
    match data:
        case AnnData():
            return [*([] if data.X is None else [None]), *data.layers, *_raw_of(data.raw is not None, data.layers)]
        case str() | os.PathLike() if is_address(data):
            return soma_layers(data)
        case str() | os.PathLike():
            files = files_in(Path(data))
            found = [soma_layers(file) if is_soma(file) else _matrices_in(AnnDataFile(file)) for file in files]
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
            f"Expected a path to .h5ad, .zarr or TileDB-SOMA, or a folder of these, but '{path}' does not exist. Check "
            f"the path; the current directory is '{Path.cwd()}'."
        )
    if is_folder_of_arrays(path):
        return _open_written(path, layer)
    if is_genecorpus(path):
        return RankedCells(path)
    files = files_in(path)
    if files == [path]:
        return _open_file(path, layer)
    if not files:
        raise FileNotFoundError(
            f"Expected .h5ad or .zarr files in '{path}', or a complete folder from `write_arrays`, got "
            f"{listed([file.name for file in path.iterdir()])}. Pass the folder that holds the data."
        )
    return ConcatenatedCells([_open_file(file, layer) for file in files])


def _open_file(path: Path, layer: str | None) -> StoredCells:
    if is_soma(path):
        return open_soma(path, layer=layer)
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


def _open_written(folder: Path, layer: str | None) -> StoredCells:
    source = open_arrays(folder)
    if layer not in (None, source.layer):
        raise KeyError(_no_layer(layer, [] if source.layer is None else [source.layer], f"'{folder}'"))
    return source


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


def files_in(path: Path) -> list[Path]:
    """List the files of a path: the path itself, the data sets of a collection, or the files in a folder."""
    if path.is_file() or is_soma(path):
        return [path]
    if (path / "zarr.json").exists() or (path / ".zgroup").exists():
        return _datasets_in(path) or [path]
    if not path.is_dir():
        return []
    inside = (file for file in path.iterdir() if file.suffix in (".h5ad", ".zarr") or is_soma(file))
    return sorted(one for file in inside for one in (files_in(file) if file.is_dir() else [file]))


def _datasets_in(path: Path) -> list[Path]:
    """List the data sets of an annbatch collection in the order of their numbers; none for another zarr."""
    attributes = json.loads((path / "zarr.json").read_text())["attributes"] if (path / "zarr.json").exists() else {}
    if attributes.get("encoding-type") not in _COLLECTIONS:
        return []
    found = [(_DATASET.fullmatch(file.name), file) for file in path.iterdir()]
    return [file for _, file in sorted((int(name[1]), file) for name, file in found if name)]


def _no_layer(layer: str, names: Sequence[str | None], name: str) -> str:
    if not any(name is not None for name in names):
        return f"Expected layer {layer!r} in {name}, but it has neither layers nor .raw. Leave `layer=` out to read X."
    raw = "" if RAW in names else ", and it has no .raw"
    return (
        f"Expected layer {layer!r} in {name}, but its layers are {_listed(names)}{raw}. Pass one of them, or "
        "`layer=None` for X."
    )


def _listed(names: Sequence[str | None]) -> str:
    return listed([name for name in names if name is not None])
