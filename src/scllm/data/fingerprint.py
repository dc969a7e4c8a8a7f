"""Fingerprints of matrices: digests of their content, which do not depend on how and where they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scllm._typing import CSR, IntArray
from scllm.data.anndata_file import stamp

if TYPE_CHECKING:
    from scllm.data.cells import CellSource
    from scllm.data.genes import GeneMatch

__all__ = ["fingerprint", "hash_arrays", "hash_match", "same_matrix", "source_stamp"]

# number of rows held at a time, and of rows in the sample
_ROWS = 1024
# matrices on disk with at most this many values are read completely, which takes seconds even if compressed
_READ_ALL = 1 << 26

# fingerprints of matrices on disk that this process has already hashed
_known: dict[tuple[str, str], str] = {}


def fingerprint(source: CellSource) -> str:
    """Hash the genes and the matrix of a source into three digests, joined by ``-``.

    The first digest covers the names of the genes in their order. The second covers the number of values in each row
    and the content of 1024 rows that are drawn at random with a fixed seed. The third covers all values; it is omitted
    for a CSR matrix in a file, or a TileDB-SOMA, with more than 67 million values. The matrix is hashed in canonical
    form: columns sorted, duplicates summed, no explicit zeros, and one number type. Therefore a matrix has the same
    fingerprint whether it is CSR, CSC or dense, in memory, in one file or in several. Only for a TileDB-SOMA of that
    size whose ``obs`` has no column ``nnz`` (the Census has one), the second digest is another: it covers the number of
    all values instead of that in each row. Compare fingerprints with :func:`same_matrix`.

    Without the third digest, a change can be missed. If values change in ``k`` of ``n`` cells, but not the number of
    genes that each of them expresses, the probability of missing it is ``(1 - k / n) ** 1024``: 36 % if one cell in a
    thousand changes, and less than 1 in 10,000 if one in a hundred does.
    """
    genes = _digest("\0".join(map(str, source.genes)).encode())
    key = (genes, source_stamp(source) or "")
    if key not in _known:
        found = _of_matrix(source)
        if not key[1]:  # values in memory may change at any time, so their fingerprint is not cached
            return f"{genes}-{found}"
        _known[key] = found
    return f"{genes}-{_known[key]}"


def same_matrix(one: str, other: str) -> bool:
    """Whether two fingerprints belong to the same matrix, compared by all digests that both have."""
    return all(ours == theirs for ours, theirs in zip(one.split("-"), other.split("-")))


def hash_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hash the names and values of arrays, in the order of their names."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def hash_match(match: GeneMatch) -> str:
    """Hash the token of each gene for each file, because a gene that a file did not measure is not a zero."""
    files = {f"file {number}": file.token_ids for number, file in enumerate(match.files)}
    of_cell = {} if match.file_of is None else {"file of": match.file_of}
    return hash_arrays({"tokens": match.token_ids, **files, **of_cell})


def source_stamp(source: CellSource) -> str | None:
    """Hash the state of the files of a source, or of what is at its address; ``None`` if any of it is in memory.

    The stamp is not part of the fingerprint. It only avoids reading an unchanged file again.
    """
    stamps = [(part.layer, _stamp(part)) for part in getattr(source, "parts", [source])]
    return None if any(found is None for _, found in stamps) else _digest(repr(stamps).encode())


def _stamp(part: Any) -> str | None:
    path = getattr(part, "path", None)
    return getattr(part, "stamp", None) if path is None else stamp(path)


def _of_matrix(source: CellSource) -> str:
    """Digest the row lengths and the sample and, unless the file is large, all values."""
    stored = None if source_stamp(source) is None or not source.chunked else _stored_lengths(source)
    if stored is not None and stored.sum() > _READ_ALL:
        sampled = _of_some(source, stored)
        if sampled is not None:
            return sampled
    if stored is None and (n_values := _n_values(source)) > _READ_ALL:
        return _of_rows(_canonical(source.read(_sampled_rows(source))), np.array([source.n_obs, n_values]))
    return _of_all(source)


def _stored_lengths(source: CellSource) -> IntArray | None:
    """Number of values stored for each cell, if the files record it."""
    found: list[Any] = [getattr(part, "lengths", None) for part in getattr(source, "parts", [source])]
    return None if any(lengths is None for lengths in found) else np.concatenate(found)


def _n_values(source: CellSource) -> int:
    """Number of values in the parts of a source that tell it without listing the length of each row."""
    return sum(getattr(part, "n_values", None) or 0 for part in getattr(source, "parts", [source]))


def _of_some(source: CellSource, lengths: IntArray) -> str | None:
    """Digest a sample of rows; ``None`` if ``lengths`` counts stored zeros or duplicates."""
    rows = _sampled_rows(source)
    block = _canonical(source.read(rows))
    return _of_rows(block, lengths) if np.array_equal(np.diff(block.indptr), lengths[rows]) else None


def _sampled_rows(source: CellSource) -> IntArray:
    return np.sort(np.random.default_rng(0).choice(source.n_obs, min(_ROWS, source.n_obs), replace=False))


def _of_rows(block: CSR, lengths: IntArray) -> str:
    return _digest(lengths.astype("<i8"), block.indices.astype("<i4"), block.data.astype("<f8"))


def _of_all(source: CellSource) -> str:
    """Digest the row lengths and the sample, and all values, in one pass."""
    lengths, sampled = [np.empty(0, np.int64)], [source.read(slice(0, 0))]
    columns, values = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=8)
    rows = _sampled_rows(source)
    for start in range(0, source.n_obs, _ROWS):
        block = _canonical(source.read(slice(start, start + _ROWS)))
        lengths.append(np.diff(block.indptr))
        columns.update(block.indices.astype("<i4", copy=False).data)
        values.update(_narrow(block.data).data)
        sampled.append(block[rows[(rows >= start) & (rows < start + _ROWS)] - start])
    found = np.concatenate(lengths)
    content = _digest(found.astype("<i8"), columns.digest(), values.digest())
    return f"{_of_rows(sparse.vstack(sampled, format='csr'), found)}-{content}"


def _canonical(block: CSR) -> CSR:
    """Remove explicit zeros; the columns are already sorted and free of duplicates."""
    if np.count_nonzero(block.data) < block.nnz:
        block.eliminate_zeros()
    return block


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Convert to float32 if that is exact, else to float64, so that equal numbers of any type have equal bytes."""
    with np.errstate(over="ignore"):
        narrow = values.astype("<f4", copy=False)
    return narrow if narrow is values or np.array_equal(narrow, values) else values.astype("<f8")


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
