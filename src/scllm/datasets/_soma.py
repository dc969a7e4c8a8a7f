"""Reading cells from a TileDB-SOMA that is laid out like the CZ CELLxGENE Census."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import requests

from scllm._checks import missing_key
from scllm._typing import CSR, IntArray
from scllm.data.soma import (
    CELL_NAMES,
    GENE_NAMES,
    ID,
    first_line,
    is_address,
    named,
    patiently,
    read_counts,
    tiledbsoma,
)

__all__ = ["Experiment", "open_experiment"]

_KEPT = ": what was already written to out= is kept"
_RELEASES = "https://census.cellxgene.cziscience.com/cellxgene-census/v1/release.json"
_TIMEOUT = 10
# tiledbsoma's default of a gigabyte for each column is more than a part of a download takes
_BUFFER = 2**27


@dataclass(frozen=True)
class Experiment:
    """The cells of one organism in an open SOMA.

    Parameters
    ----------
    soma
        The open experiment of tiledbsoma.
    version
        Build date of the Census; ``None`` if the SOMA states none.
    """

    soma: Any
    version: str | None

    @cached_property
    def obs_columns(self) -> list[str]:
        """Columns of ``obs``."""
        return list(self.soma.obs.schema.names)

    def texts(self, column: str) -> list[str]:
        """All values of a column of text that is stored by categories; none for another column."""
        if not hasattr(self.soma.obs.schema.field(column).type, "value_type"):
            return []
        return [str(value) for value in self.soma.obs.get_enumeration_values([column])[column].to_pylist()]

    def ids(self, obs_filter: str | None, columns: Sequence[str]) -> pd.DataFrame:
        """Read the id and some columns of the cells that pass a filter, in the order of their ids."""

        def read() -> pd.DataFrame:
            found = self.soma.obs.read(value_filter=obs_filter, column_names=[ID, *columns])
            return found.concat().to_pandas()

        try:
            table = patiently(read, "the table of cells", fatal=_is_about_filter)
        except tiledbsoma().SOMAError as error:
            raise ValueError(
                f"Expected obs_filter to compare columns with values of their type, got {obs_filter!r} "
                f"({first_line(error)}). Write it like \"cell_type == 'B cell' and nnz > 500\"."
            ) from error
        return table.sort_values(ID, ignore_index=True)

    def obs(self, ids: IntArray) -> pd.DataFrame:
        """Read all columns of cells, given their ids in increasing order."""
        table = patiently(
            lambda: self.soma.obs.read(coords=(ids,)).concat().to_pandas(),
            f"the table of {len(ids):,} cells",
            kept=_KEPT,
        )
        return named(table, CELL_NAMES)

    @cached_property
    def var(self) -> pd.DataFrame:
        """The table of genes, in the order of their ids."""
        table = patiently(lambda: self._rna.var.read().concat().to_pandas(), "the table of genes")
        return named(table, GENE_NAMES)

    def counts(self, ids: IntArray) -> CSR:
        """Read the counts of cells, given their ids in increasing order, ``(n_cells, n_genes)``."""
        gene_ids = self.var[ID].to_numpy(np.int64)
        return patiently(
            lambda: read_counts(self._rna.X["raw"], ids, gene_ids, np.dtype(np.float32)),
            f"the counts of {len(ids):,} cells",
            kept=_KEPT,
        )

    @property
    def _rna(self) -> Any:
        return self.soma.ms["RNA"]


@contextmanager
def open_experiment(uri: str | None, census_version: str, organism: str) -> Iterator[Experiment]:
    """Open a SOMA on this machine, at another address, or the public Census in a version."""
    packages = _packages()
    is_local = uri is not None and _is_local(uri)
    if uri is None:
        _check_release(census_version)
    elif is_local:
        _check_local(uri)
    config = {"soma.init_buffer_bytes": _BUFFER}

    def opened() -> Any:
        return packages.open_soma(census_version=census_version, uri=uri, tiledb_config=config)

    where = f"the Census of version {census_version!r}" if uri is None else repr(uri)
    # on this machine, what cannot be opened is something else; elsewhere, the connection may have failed
    fatal = tiledbsoma().SOMAError if is_local else tiledbsoma().DoesNotExistError
    try:
        census = patiently(opened, where, fatal=lambda error: isinstance(error, fatal))
    except fatal as error:
        raise ValueError(
            f"Expected a TileDB-SOMA laid out like the Census at {where}, got something else "
            f"({first_line(error)}). Pass the folder that holds 'census_data' and 'census_info' as uri=."
        ) from error
    with census:
        yield Experiment(_organism(census, organism, where), _build_date(census))


def _packages() -> ModuleType:
    try:
        import cellxgene_census
    except ImportError as error:
        raise ImportError(
            "Expected the packages cellxgene-census and tiledbsoma, which scllm.datasets.census needs, got "
            f'{error}. Run: pip install "scllm-tools[census]"'
        ) from error
    return cellxgene_census


def _check_release(version: str) -> None:
    """Raise if the list of releases cannot be reached, or has no such version; the Census itself waits long."""
    try:
        answer = requests.get(_RELEASES, timeout=_TIMEOUT)
        answer.raise_for_status()
        known = answer.json()
    except requests.RequestException as error:
        raise FileNotFoundError(
            f"Expected to read the list of Census releases at {_RELEASES}, got no answer ({error}). Use a machine with "
            "a connection, or pass uri= with the folder of a Census on this machine."
        ) from error
    if version not in known:
        raise missing_key(version, sorted(known, reverse=True), "a Census release", "Correct census_version=.")


def _is_local(uri: str) -> bool:
    return not is_address(uri) or uri.startswith("file://")


def _check_local(uri: str) -> None:
    """Raise if a path on this machine is not a folder."""
    path = Path(uri.removeprefix("file://"))
    if path.is_file():
        raise ValueError(f"Expected uri to be the folder of a TileDB-SOMA, got the file '{path}'. Unpack it first.")
    if not path.exists():
        raise FileNotFoundError(
            f"Expected uri to be the folder of a TileDB-SOMA, but '{path}' does not exist. Check the path."
        )


def _organism(census: Any, organism: str, where: str) -> Any:
    """Return the experiment of an organism; ``Homo sapiens`` is ``homo_sapiens``."""
    if "census_data" not in census:
        raise ValueError(
            f"Expected 'census_data' in {where}, as in the Census, got {sorted(census)}. Pass the folder above it."
        )
    name = organism.strip().lower().replace(" ", "_")
    if name not in census["census_data"]:
        raise missing_key(organism, list(census["census_data"]), f"an organism in {where}", "Correct organism=.")
    experiment = census["census_data"][name]
    if "RNA" not in experiment.ms or "raw" not in experiment.ms["RNA"].X:
        raise ValueError(
            f"Expected raw counts in ms['RNA'].X['raw'] of {organism!r} in {where}, but there are none. Pass the "
            "address of a Census."
        )
    return experiment


def _build_date(census: Any) -> str | None:
    """Return the version that a Census states about itself."""
    if "census_info" not in census or "summary" not in census["census_info"]:
        return None
    summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
    return None if "census_build_date" not in summary else str(summary["census_build_date"])


def _is_about_filter(error: Exception) -> bool:
    """Whether tiledbsoma rejects the filter, for which it has no type of error of its own."""
    return "querycondition" in str(error).replace("_", "").lower()
