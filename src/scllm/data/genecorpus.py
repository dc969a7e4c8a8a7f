"""Folders of rank-ordered token sequences for Geneformer: Hugging Face ``datasets`` with ``input_ids`` and ``length``.

A token sequence has the order of genes, but not their expression. As a source of cells, the folder therefore gives
values that reproduce this order: the rank from the end times the gene's median. The folder also holds the dictionaries
of tokens and of gene medians.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from scllm._checks import missing_key
from scllm._typing import CSR, FloatArray, IntArray, Rows
from scllm.data.dictionaries import read_dictionary
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab

__all__ = ["RankedCells", "is_genecorpus", "write_genecorpus"]

_TOKENS, _MEDIANS = "token_dictionary", "gene_median"
_COLUMNS = ("input_ids", "length")


class RankedCells:
    """A folder of rank-ordered token sequences as a source of cells."""

    layer: str | None = None
    chunked = True
    chunk_rows = 64

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sequences = _datasets().load_from_disk(str(path)).with_format("arrow")
        if "input_ids" not in self._sequences.column_names:
            raise ValueError(
                f"Expected a column 'input_ids' (the tokens of each cell) in {path}, got the columns "
                f"{self._sequences.column_names}. Write the folder with `scllm genecorpus`."
            )
        self.vocab = Vocab.read(_beside(path, _TOKENS))
        medians = read_dictionary(_beside(path, _MEDIANS))
        self.medians = np.array([medians.get(token, np.nan) for token in self.vocab.tokens], np.float64)
        self.n_obs = len(self._sequences)
        self.var = pd.DataFrame(index=pd.Index(self.vocab.genes))
        self.genes = self.var.index

    @cached_property
    def _column(self) -> np.ndarray:
        """Column of each token, -1 for special tokens."""
        column = np.full(len(self.vocab), -1, np.int32)
        column[self.vocab.gene_ids] = np.arange(len(self.vocab.genes))
        return column

    @cached_property
    def lengths(self) -> IntArray | None:
        """Number of genes of each cell, if the folder has ``length``; every cell has the same special tokens."""
        if "length" not in self._sequences.column_names or not self.n_obs:
            return None
        found = self._sequences.select_columns(["length"])[:]["length"].to_numpy()
        return found - (found[0] - self.read(slice(0, 1)).nnz)

    def read(self, rows: Rows) -> CSR:
        """Read rows in the given order."""
        rows = np.arange(self.n_obs)[rows]
        if not len(rows):
            return sparse.csr_matrix((0, len(self.genes)), dtype=np.float64)
        lists = self._sequences[rows]["input_ids"].combine_chunks()
        lengths = np.diff(lists.offsets.to_numpy())
        tokens = lists.flatten().to_numpy()
        # the first gene is the highest; dropping special tokens leaves gaps in the values but keeps their order
        from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))
        cell, is_gene = np.repeat(np.arange(len(rows)), lengths), self._column[tokens] >= 0
        values = (from_end * self.medians[tokens])[is_gene]
        shape = (len(rows), len(self.genes))
        counts = sparse.csr_matrix((values, (cell[is_gene], self._column[tokens[is_gene]])), shape=shape)
        counts.sort_indices()
        return counts

    @property
    def obs_names(self) -> pd.Index:
        """Numbers of the cells, because the folder has no names for them."""
        return pd.RangeIndex(self.n_obs).astype(str)

    @property
    def obs_columns(self) -> list[str]:
        """Names of the columns beside the token sequence of each cell."""
        return [name for name in self._sequences.column_names if name not in _COLUMNS]

    def obs(self, columns: Sequence[str]) -> pd.DataFrame:
        """Read columns."""
        for column in columns:
            if column not in self.obs_columns:
                raise missing_key(column, self.obs_columns, f"a column of {self.path}")
        if not columns:
            return pd.DataFrame(index=pd.RangeIndex(self.n_obs))
        return self._sequences.select_columns(list(columns))[:].to_pandas()


def is_genecorpus(path: Path) -> bool:
    """Whether a folder is one that ``datasets`` saved."""
    return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()


def write_genecorpus(
    sequences: Iterator[Tokens], path: Path, *, vocab: Vocab, medians: FloatArray, obs: pd.DataFrame
) -> None:
    """Write token sequences as a ``datasets`` folder, with the dictionaries that belong to them.

    Parameters
    ----------
    sequences
        Token sequences of the cells in the order of ``obs``; one part is held in memory at a time.
    path
        Folder to create.
    vocab
        Vocabulary of the tokens.
    medians
        Median of each token, NaN if it has none.
    obs
        Columns to store beside the token sequence of each cell.
    """
    import pyarrow as pa

    datasets = _datasets()
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"Expected a new folder, but {path} is not empty. Remove it, or choose another.")
    plain = {name: _plain(column) if column.dtype == "category" else column for name, column in obs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".genecorpus.", dir=path.parent) as folder:
        file, row, writer = Path(folder) / "sequences.arrow", 0, None
        for part in sequences:
            rows = slice(row, row + len(part))
            ids = pa.ListArray.from_arrays(pa.array(part.indptr, pa.int32()), pa.array(part.genes, pa.int32()))
            columns: dict[str, Any] = {"input_ids": ids, "length": pa.array(part.lengths, pa.int64())}
            columns |= {name: pa.array(column.iloc[rows]) for name, column in plain.items()}
            table = pa.table(columns)
            writer = writer or pa.ipc.new_stream(str(file), table.schema)
            writer.write_table(table)
            row = rows.stop
        if writer is not None:
            writer.close()
        with _quiet(datasets):
            datasets.Dataset.from_file(str(file)).save_to_disk(str(path))
    known = {token: float(value) for token, value in zip(vocab.tokens, medians, strict=True) if np.isfinite(value)}
    (path / f"{_TOKENS}.json").write_text(json.dumps({token: i for i, token in enumerate(vocab.tokens)}))
    (path / f"{_MEDIANS}_dictionary.json").write_text(json.dumps(known))


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Disable the progress bars of datasets, which are drawn even without a terminal."""
    was_quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_quiet:
            datasets.enable_progress_bars()


def _beside(path: Path, name: str) -> Path:
    files = [file for file in sorted(path.glob(f"{name}*")) if file.name.endswith((".json", ".json.gz", ".pkl"))]
    if len(files) != 1:
        raise FileNotFoundError(
            f"Expected one file {name}*.json or .pkl in {path}, got {len(files)}. One dictionary says which gene a "
            "token is, another the gene's median. Copy those that the token sequences were made with into the folder."
        )
    return files[0]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "Folders of rank-ordered token sequences need the package datasets, which is not installed. Run "
            '`pip install "scllm-tools[genecorpus]"`.'
        ) from error
    return datasets


def _plain(column: pd.Series) -> pd.Series:
    """Convert categories to strings; missing values stay missing."""
    return column.astype(object).map(str, na_action="ignore").where(column.notna(), None)
