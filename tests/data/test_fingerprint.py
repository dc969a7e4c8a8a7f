"""The fingerprint of a matrix: the same however it is stored, another one as soon as a value changes."""

from __future__ import annotations

import os

import anndata
import numpy as np
import pytest
from anndata import AnnData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from scllm.data import fingerprint as module
from scllm.data.arrays import write_arrays
from scllm.data.fingerprint import fingerprint, same_matrix
from scllm.data.source import open_source


def of(data, **options) -> str:
    return fingerprint(open_source(data, **options))


@pytest.fixture
def matrix():
    """2,500 cells by 30 genes: more rows than are read at a time."""
    return sparse.random(2500, 30, 0.2, "csr", np.float32, np.random.default_rng(0)).multiply(9).ceil().tocsr()


@pytest.fixture
def little(monkeypatch):
    """Matrices on disk are large, and a sample of 50 rows is read of them."""
    monkeypatch.setattr(module, "_READ_ALL", 100)
    monkeypatch.setattr(module, "_ROWS", 50)


def untidy(matrix):
    """The same numbers with unsorted columns, an explicit zero in every row, and in halves that are summed."""
    zeros = sparse.csr_matrix((np.zeros(matrix.shape[0]), ([*range(matrix.shape[0])], [0] * matrix.shape[0])))
    zeros.resize(matrix.shape)
    rows = []
    for row in range(matrix.shape[0]):
        parts = [part[row] for part in (matrix * 0.5, zeros, matrix * 0.5)]
        rows.append((np.concatenate([p.data for p in parts])[::-1], np.concatenate([p.indices for p in parts])[::-1]))
    ends = np.cumsum([0, *(len(values) for values, _ in rows)])
    found = tuple(np.concatenate(part) for part in zip(*rows, strict=True))
    return sparse.csr_matrix((*found, ends), shape=matrix.shape)


STORED = {
    "csc": lambda m: AnnData(m.tocsc()),
    "dense": lambda m: AnnData(m.toarray()),
    "float64": lambda m: AnnData(m.astype(np.float64)),
    "int64": lambda m: AnnData(m.astype(np.int64)),
    "uint8": lambda m: AnnData(m.astype(np.uint8)),
    "untidy": lambda m: AnnData(untidy(m)),
    "view": lambda m: AnnData(sparse.vstack([m, m], format="csr"))[: m.shape[0]],
    "layer": lambda m: AnnData(layers={"counts": m}),
}


@pytest.mark.parametrize("how", STORED)
def test_the_same_matrix_has_the_same_fingerprint_however_it_is_stored(how, matrix, tmp_path):
    stored = STORED[how](matrix)
    layer = "counts" if how == "layer" else None
    assert of(stored, layer=layer) == of(AnnData(matrix))
    stored.copy().write_h5ad(tmp_path / "a.h5ad")
    stored.copy().write_zarr(tmp_path / "a.zarr")
    for file in ("a.h5ad", "a.zarr"):
        assert of(tmp_path / file, layer=layer) == of(AnnData(matrix))
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert of(backed, layer=layer) == of(AnnData(matrix))
    assert of(write_arrays(open_source(stored, layer=layer), tmp_path / "arrays")) == of(AnnData(matrix))


@pytest.mark.parametrize("how", STORED)
def test_a_large_file_holds_the_same_matrix_as_the_data_in_memory(how, matrix, tmp_path, little):
    stored = STORED[how](matrix)
    layer = "counts" if how == "layer" else None
    stored.copy().write_h5ad(tmp_path / "a.h5ad")
    on_disk, in_memory = of(tmp_path / "a.h5ad", layer=layer), of(AnnData(matrix))
    assert same_matrix(on_disk, in_memory)
    # which files say how many values are in a row; others are read whole
    assert on_disk.count("-") == (2 if how in ("dense", "csc", "untidy") else 1)
    assert in_memory.count("-") == 2


def test_files_in_a_list_have_the_fingerprint_of_one_matrix(matrix, tmp_path):
    for number, rows in enumerate((slice(0, 1000), slice(1000, None))):
        AnnData(matrix[rows]).write_h5ad(tmp_path / f"{number}.h5ad")
    assert of(tmp_path) == of(AnnData(matrix))
    assert of([tmp_path / "1.h5ad", tmp_path / "0.h5ad"]) != of(AnnData(matrix))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_matrix_in_memory_is_another_fingerprint(matrix, data):
    row, column = data.draw(st.integers(0, 2499)), data.draw(st.integers(0, 29))
    other = matrix.tolil()
    other[row, column] = matrix[row, column] + data.draw(st.sampled_from([1, 0.001, -0.5, 300]))
    assert not same_matrix(of(AnnData(other.tocsr())), of(AnnData(matrix)))


def test_other_genes_cells_or_orders_are_another_fingerprint(matrix):
    named = AnnData(matrix)
    named.var_names = [f"gene_{i}" for i in range(30)]
    others = [AnnData(matrix[::-1]), AnnData(matrix[:, ::-1]), AnnData(matrix[:-1]), AnnData(matrix[:, :-1]), named]
    assert len({of(other) for other in [AnnData(matrix), *others]}) == 6


@pytest.mark.parametrize("change", ["a value that appears", "values in every tenth cell", "columns"])
def test_a_large_file_that_changes_has_another_fingerprint(change, matrix, tmp_path, little):
    AnnData(matrix).write_h5ad(tmp_path / "a.h5ad")
    before, other = of(tmp_path / "a.h5ad"), matrix.copy()
    if change == "values in every tenth cell":
        for row in range(0, 2500, 10):
            other.data[other.indptr[row] : other.indptr[row + 1]] += 1
    elif change == "columns":
        other.indices = 29 - other.indices
    else:
        other = other.tolil()
        other[1234, np.setdiff1d(np.arange(30), matrix[1234].indices)[0]] = 1
        other = other.tocsr()
    AnnData(other).write_h5ad(tmp_path / "a.h5ad")
    assert not same_matrix(of(tmp_path / "a.h5ad"), before)


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
def test_a_file_is_hashed_once_and_again_when_it_was_written(kind, matrix, tmp_path, monkeypatch):
    path, hashed = tmp_path / f"a.{kind}", []
    hash_all = module._of_all
    monkeypatch.setattr(module, "_of_all", lambda source: hashed.append(1) or hash_all(source))
    write = AnnData.write_h5ad if kind == "h5ad" else AnnData.write_zarr
    write(AnnData(matrix), path)
    assert of(path) == of(path)
    assert len(hashed) == 1
    # the time of a file is no part of what it holds
    for file in [path, *path.rglob("*")]:
        os.utime(file, (1, 1))
    first = of(path)
    assert len(hashed) == 2
    write(AnnData(matrix * 2), path)
    assert of(path) != first
    in_memory = AnnData(matrix)
    assert of(in_memory) == of(in_memory) == first
    assert len(hashed) == 5  # in memory, values may change at any time
