"""TileDB-SOMA as a source of cells: a Census, an organism of one, or any other experiment, on disk or at an address."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from scipy import sparse

from scllm._log import log
from scllm._names import listed
from scllm._typing import CSR, IntArray
from scllm.data.cells import StoredCells
from scllm.data.opened import opened
from scllm.data.storage import stored_dtype
from scllm.kernels.ragged import take_rows

__all__ = [
    "CELL_NAMES",
    "GENE_NAMES",
    "ID",
    "first_line",
    "is_address",
    "is_soma",
    "named",
    "open_soma",
    "patiently",
    "read_counts",
    "soma_layers",
    "tiledbsoma",
]

T = TypeVar("T")

ID = "soma_joinid"
# what TileDB writes into a folder of groups or of an array
_OF_TILEDB = ("__tiledb_group.tdb", "__group", "__schema")
# columns that name cells and genes, the best first; the Census itself names cells by their id only
CELL_NAMES, GENE_NAMES = ("obs_id", ID), ("feature_id", "var_id", ID)
# the measurement and the matrix of the Census
_RNA, _RAW = "RNA", "raw"
# column of obs in which the Census counts the values of each cell
_N_VALUES = "nnz"
# bytes for each column of a read: with tiledbsoma's default of a gigabyte, its memory dwarfs that of the cells
_BUFFER = 2**25
# the public Census can be read without an account, in this region only
_PUBLIC = "s3://cellxgene-census-public-us-west-2"
_ACCESS = {"vfs.s3.no_sign_request": "true", "vfs.s3.region": "us-west-2"}
# retries after 1, 2, 4 and 8 seconds
_TRIES, _FIRST_WAIT = 5, 1.0

_opening = threading.RLock()


def tiledbsoma() -> ModuleType:
    """Import tiledbsoma."""
    try:
        import tiledbsoma
    except ImportError as error:
        raise ImportError(
            f"Expected the package tiledbsoma, which reads TileDB-SOMA, got {error}. Run: "
            'pip install "scllm-tools[census]"'
        ) from error
    return tiledbsoma


def is_address(data: str | os.PathLike) -> bool:
    """Whether this is an address such as ``s3://...`` rather than a path."""
    return "://" in os.fspath(data)


def is_soma(path: str | os.PathLike) -> bool:
    """Whether this is an address, or a folder that TileDB wrote."""
    return is_address(path) or any((Path(path) / name).exists() for name in _OF_TILEDB)


def open_soma(uri: str | os.PathLike, *, layer: str | None = None) -> StoredCells:
    """Open all cells of an experiment for reading by rows.

    Cells come in the order of their ids (``soma_joinid``), and so do genes. The experiment is read as it was when it
    was opened, whatever is written to it later.

    Parameters
    ----------
    uri
        An experiment, or a Census with one organism: a folder, or an address that TileDB can read (``s3://``,
        ``tiledb://``, ...).
    layer
        Matrix in ``X`` of the measurement ``"RNA"`` (or of the only one). ``None``: ``"raw"``, or the only one.

    Returns
    -------
    The source.
    """
    try:
        experiment = _Experiment(os.fspath(uri))
        store = _Rows(experiment, _layer(experiment, layer))
    except tiledbsoma().SOMAError as error:
        raise _unreadable("a part of it", os.fspath(uri), error) from error
    if "is_primary_data" in store.tables.obs_columns:
        log.info(
            "reading all cells of '%s', also copies of one cell in several data sets (is_primary_data is False); "
            "scllm.datasets.census(uri=, out=) writes a selection of cells",
            experiment.uri,
        )
    return StoredCells(store, store.tables, name=f"'{experiment.uri}'", layer=layer)


def soma_layers(uri: str | os.PathLike) -> list[str | None]:
    """List the values of ``layer`` that :func:`open_soma` accepts."""
    names = list(_Experiment(os.fspath(uri)).measurement.X)
    return [*([None] if _RAW in names or len(names) == 1 else []), *names]


class _Experiment:
    """An open experiment. Every process opens it for itself; it is pickled as its address and time."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if is_address(uri) else str(Path(uri).absolute())
        self.is_local = self.uri.startswith("file://") or not is_address(uri)
        self._time: int | None = None
        self._root: Any = None
        self._of_parent: Any = None
        self._process = os.getpid()
        opened(self)
        self.uri = self._find()
        self._measurement = self._choose()

    @property
    def path(self) -> Path | None:
        """The folder; ``None`` at an address."""
        return Path(self.uri.removeprefix("file://")) if self.is_local else None

    @property
    def root(self) -> Any:
        """The open ``tiledbsoma.Experiment``."""
        with _opening:
            self._leave_to_parent()
            if self._root is None:
                self._root = self._open()
                self._time = self._root.tiledb_timestamp_ms
            return self._root

    @property
    def measurement(self) -> Any:
        """The open ``tiledbsoma.Measurement``."""
        return self.root.ms[self._measurement]

    def reading(self, read: Callable[[], T], what: str) -> T:
        """Read, again if it fails at an address, and raise an ``OSError`` that names what could not be read."""
        try:
            return patiently(read, f"{what} in '{self.uri}'", fatal=lambda error: self.is_local)
        except (tiledbsoma().SOMAError, RuntimeError) as error:
            raise _unreadable(what, self.uri, error) from error

    def close(self) -> None:
        """Close it; the next read opens it again."""
        with _opening:
            self._leave_to_parent()
            if self._root is not None:
                self._root.close()
            self._root = None

    def _leave_to_parent(self) -> None:
        """In a forked process, keep what the parent has opened: closing it would wait for threads that are not here."""
        if self._process != os.getpid():
            self._of_parent, self._root, self._process = self._root, None, os.getpid()

    def _open(self) -> Any:
        soma, context = tiledbsoma(), _context(self.uri.startswith(_PUBLIC), os.getpid())
        fatal = soma.SOMAError if self.is_local else soma.DoesNotExistError
        try:
            return patiently(
                lambda: soma.open(self.uri, context=context, tiledb_timestamp=self._time),
                f"'{self.uri}'",
                fatal=lambda error: isinstance(error, fatal),
            )
        except fatal as error:
            raise FileNotFoundError(
                f"Expected a TileDB-SOMA at '{self.uri}', got something else ({first_line(error)}). Check the address, "
                "and whether it was copied completely."
            ) from error

    def _find(self) -> str:
        """Return the address of the experiment, which in a Census is that of its organism."""
        names = list(self.root) if hasattr(self.root, "keys") else []
        if {"obs", "ms"} <= {*names}:
            return self.uri
        organisms = list(self.root["census_data"]) if "census_data" in names else []
        if len(organisms) != 1:
            seen = (
                f"a Census of {listed(organisms)}" if organisms else f"{type(self.root).__name__} with {listed(names)}"
            )
            advice = (
                f"Pass '{self.uri}/census_data/{organisms[0]}', or another organism" if organisms else "Pass its folder"
            )
            self.close()
            raise ValueError(
                f"Expected an experiment with 'obs' and 'ms', or a Census with one organism, at '{self.uri}', got "
                f"{seen}. {advice}."
            )
        self.close()
        return f"{self.uri.rstrip('/')}/census_data/{organisms[0]}"

    def _choose(self) -> str:
        """Return the name of the measurement to read."""
        names = list(self.root.ms)
        if _RNA in names or len(names) == 1:
            return _RNA if _RNA in names else names[0]
        raise ValueError(
            f"Expected a measurement {_RNA!r} in '{self.uri}', or only one, got {listed(names)}. Write the cells of "
            "the one that you mean to an .h5ad or .zarr file, and pass that."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_root": None, "_of_parent": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _unreadable(what: str, uri: str, error: Exception) -> OSError:
    """Make the error for what is missing or damaged in an experiment."""
    return OSError(
        f"Expected to read '{uri}', but {what} could not be read ({first_line(error)}). Files may be missing, or "
        "have been moved since it was opened. Check whether it was copied completely, then call again."
    )


@cache
def _context(is_public: bool, process: int) -> Any:
    """Return the settings, threads and caches of TileDB, of which a process needs only one."""
    config = {"soma.init_buffer_bytes": _BUFFER, **(_ACCESS if is_public else {})}
    return tiledbsoma().SOMATileDBContext(tiledb_config=config)


def _layer(experiment: _Experiment, layer: str | None) -> str:
    """Return the name of the matrix to read."""
    names = list(experiment.measurement.X)
    if layer is None and (_RAW in names or len(names) == 1):
        return _RAW if _RAW in names else names[0]
    if layer is None or layer not in names:
        asked = f"layer {layer!r}" if layer is not None else f"a matrix {_RAW!r}, or only one,"
        raise KeyError(f"Expected {asked} in '{experiment.uri}', got {listed(names)}. Pass one of them as `layer=`.")
    return layer


class _Tables:
    """Tables of an experiment. ``obs`` is read when needed."""

    def __init__(self, experiment: _Experiment) -> None:
        self._experiment = experiment
        read = experiment.measurement.var.read
        self.var = named(experiment.reading(lambda: read().concat().to_pandas(), "the table of genes"), GENE_NAMES)
        self.obs_columns = [str(name) for name in experiment.root.obs.schema.names]

    @property
    def obs_names(self) -> pd.Index:
        """Names of the cells."""
        column = next(name for name in CELL_NAMES if name in self.obs_columns)
        return pd.Index(self._read([column])[column].astype(str).to_numpy(object))

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns of ``obs``."""
        return self._read(columns)[list(columns)].reset_index(drop=True)

    def _read(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns in the order of the ids."""
        asked = list(dict.fromkeys([ID, *columns]))
        table = self._experiment.reading(
            lambda: self._experiment.root.obs.read(column_names=asked).concat().to_pandas(), "the table of cells"
        )
        return table if table[ID].is_monotonic_increasing else table.sort_values(ID, ignore_index=True)

    def close(self) -> None:
        """Close the experiment."""
        self._experiment.close()


class _Rows:
    """A matrix of an experiment.

    All rows asked for are read at once: in a slice if they are consecutive, otherwise by their ids. One read of 32
    separate chunks took 0.2 s, 32 reads took 1.6 s.
    """

    chunked = True
    chunk_rows = 256

    def __init__(self, experiment: _Experiment, layer: str) -> None:
        self._experiment, self._layer = experiment, layer
        if not isinstance(self._matrix, tiledbsoma().SparseNDArray):
            raise TypeError(
                f"Expected a sparse matrix, but X[{layer!r}] in '{experiment.uri}' is a {type(self._matrix).__name__}. "
                "Write the cells to an .h5ad or .zarr file, and pass that."
            )
        self.tables = _Tables(experiment)
        self._gene_ids = self.tables.var[ID].to_numpy(np.int64)
        self._first, n_cells, self._ids = self._cell_ids()
        self.shape = (n_cells, len(self._gene_ids))
        self.dtype = stored_dtype(np.dtype(self._matrix.type.to_pandas_dtype()))
        self.path = experiment.path

    def read(self, rows: IntArray) -> CSR:
        """Read rows in the given order."""
        ascending, asked = (rows, None) if (np.diff(rows) > 0).all() else np.unique(rows, return_inverse=True)
        ids = self._first + ascending if self._ids is None else self._ids[ascending]
        block = self._experiment.reading(
            lambda: read_counts(self._matrix, ids, self._gene_ids, self.dtype), f"the counts of {len(ids):,} cells"
        )
        if asked is None:
            return block
        indptr, indices, data = take_rows(block.indptr, asked, block.indices, block.data)
        repeated = sparse.csr_matrix((data, indices, indptr), shape=(len(rows), self.shape[1]))
        repeated.has_canonical_format = True
        return repeated

    @property
    def lengths(self) -> IntArray | None:
        """Number of values of each cell, if ``obs`` holds it."""
        if _N_VALUES not in self.tables.obs_columns:
            return None
        return self.tables._read([_N_VALUES])[_N_VALUES].to_numpy(np.int64)

    @property
    def n_values(self) -> int:
        """Number of values of all cells."""
        return int(self._matrix.nnz)

    @property
    def stamp(self) -> str | None:
        """Digest of what an experiment at an address holds; ``None`` for a folder, which is known by its files."""
        if self.path is not None:
            return None
        state = (
            self._experiment.uri,
            self._layer,
            self.shape,
            self._matrix.shape,
            self.n_values,
            self.tables.obs_columns,
        )
        return hashlib.blake2b(repr(state).encode(), digest_size=8).hexdigest()

    @property
    def _matrix(self) -> Any:
        return self._experiment.measurement.X[self._layer]

    def _cell_ids(self) -> tuple[int, int, IntArray | None]:
        """Return the first id, the number of cells, and their ids, or ``None`` for these if they are consecutive."""
        obs = self._experiment.root.obs
        n_cells = int(obs.count)
        if obs.index_column_names == (ID,) and n_cells:
            ((first, last),) = obs.non_empty_domain()
            if last - first + 1 == n_cells:
                return int(first), n_cells, None
        ids = self.tables._read([])[ID].to_numpy(np.int64)
        return 0, len(ids), ids

    def close(self) -> None:
        """Close the experiment."""
        self._experiment.close()


def read_counts(matrix: Any, ids: IntArray, gene_ids: IntArray, dtype: np.dtype) -> CSR:
    """Read rows of a ``SparseNDArray``, given ids of cells and genes in increasing order, ``(n_cells, n_genes)``."""
    cells: list[IntArray] = [np.empty(0, np.int32)]
    genes: list[IntArray] = [np.empty(0, np.int32)]
    values = [np.empty(0, dtype)]
    is_run = len(ids) > 0 and ids[-1] - ids[0] + 1 == len(ids)
    coords = slice(int(ids[0]), int(ids[-1])) if is_run else ids
    # no order is asked for, because TileDB sorts values ten times slower than they are read
    for table in matrix.read((coords, slice(None))).tables() if len(ids) else ():
        cells.append(_places(table["soma_dim_0"].to_numpy(), ids))
        genes.append(_places(table["soma_dim_1"].to_numpy(), gene_ids))
        values.append(table["soma_data"].to_numpy().astype(dtype, copy=False))
    found = (np.concatenate(values), (np.concatenate(cells), np.concatenate(genes)))
    block = sparse.csr_matrix(found, shape=(len(ids), len(gene_ids)))
    block.sum_duplicates()
    return block


def _places(found: IntArray, ids: IntArray) -> IntArray:
    """Return the position of each found id among ``ids``, which increase."""
    if ids[-1] - ids[0] + 1 == len(ids):
        return (found - ids[0]).astype(np.int32)
    return np.searchsorted(ids, found).astype(np.int32)


def named(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Sort a table by id and index it by the first of the columns ``names`` that is there and unique."""
    table = table.sort_values(ID, ignore_index=True)
    for column, values in table.items():
        if isinstance(values.dtype, pd.CategoricalDtype):
            table[column] = values.cat.remove_unused_categories()
    name = next(name for name in names if name in table and table[name].is_unique)
    return table.set_index(pd.Index(table[name].astype(str).to_numpy(object)))


def patiently(
    read: Callable[[], T], what: str, fatal: Callable[[Exception], bool] = lambda error: False, *, kept: str = ""
) -> T:
    """Read, and try again a few times with growing pauses, because connections fail now and then.

    An error that is ``fatal`` is raised at once. ``kept`` tells what an earlier call has left behind.
    """
    for number in range(_TRIES):
        try:
            return read()
        except (OSError, tiledbsoma().SOMAError) as error:
            if fatal(error):
                raise
            reason = first_line(error)
            if number == _TRIES - 1:
                raise ConnectionError(
                    f"Expected to read {what}, but it failed {_TRIES} times (last: {reason}). Check the connection and "
                    f"call again with the same arguments{kept}."
                ) from error
            wait = _FIRST_WAIT * 2**number
            log.warning("reading %s again in %.0f s, because it failed: %s", what, wait, reason)
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the type of the error if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
