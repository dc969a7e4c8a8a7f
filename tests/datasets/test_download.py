"""Filters, whole samples, and files in parts, without a SOMA."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from messages import naming
from scipy import sparse

from scllm import datasets
from scllm.datasets import _download
from scllm.datasets._filter import checked_filter, compared_texts
from scllm.datasets._samples import draw_samples, samples_of

COLUMNS = ["cell_type", "nnz", "is_primary_data"]


def test_a_missing_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(ImportError, match=naming("cellxgene-census", 'pip install "scllm-tools[census]"')):
        datasets.census(uri="anywhere")


@pytest.mark.parametrize(
    ("obs_filter", "expected"),
    [
        (None, "is_primary_data == True"),
        ("nnz > 5 or nnz < 3", "(nnz > 5 or nnz < 3) and is_primary_data == True"),
        ("attr('nnz') > 5", "(attr('nnz') > 5) and is_primary_data == True"),
        ("nnz > 5 and is_primary_data == False", "nnz > 5 and is_primary_data == False"),
    ],
)
def test_filters_leave_duplicates_out(obs_filter, expected) -> None:
    assert checked_filter(obs_filter, COLUMNS) == expected


def test_filters_of_data_without_duplicates_are_kept() -> None:
    assert checked_filter("nnz > 5", ["nnz"]) == "nnz > 5"
    assert checked_filter(None, ["nnz"]) is None


def test_texts_of_a_filter_are_found() -> None:
    obs_filter = "cell_type in ['a', 'b'] and (nnz > 5 or cell_type == 'c') and cell_type != 'd'"
    assert sorted(compared_texts(obs_filter)) == [("cell_type", "a"), ("cell_type", "b"), ("cell_type", "c")]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 300), st.integers(0, 2**31))
def test_draws_pass_over_only_what_does_not_fit(sizes, n_cells, seed) -> None:
    sizes = np.array(sizes)
    drawn = draw_samples(sizes, n_cells, seed)
    room = n_cells - sizes[drawn].sum()
    assert room >= 0
    assert (sizes[~drawn] > room).all()
    assert np.array_equal(drawn, draw_samples(sizes, n_cells, seed))
    assert draw_samples(sizes, None, seed).all()


def test_every_sample_is_drawn_as_often() -> None:
    drawn = np.mean([draw_samples(np.full(10, 20), 60, seed) for seed in range(2000)], axis=0)
    # 3 of 10 fit; three standard errors
    assert drawn == pytest.approx(np.full(10, 0.3), abs=3 * np.sqrt(0.3 * 0.7 / 2000))


def test_samples_are_combinations_that_occur() -> None:
    cells = pd.DataFrame(
        {"dataset_id": pd.Categorical(list("yyxyx"), categories=list("xyz")), "donor_id": ["1", "2", "1", "1", None]}
    )
    samples, of_cell = samples_of(cells, ["dataset_id", "donor_id"])
    assert samples["n_cells"].tolist() == [2, 1, 1, 1]
    assert of_cell.tolist() == [0, 1, 2, 0, 3]
    found = samples[["dataset_id", "donor_id"]].iloc[of_cell].astype(object)
    assert found.fillna("none").to_numpy().tolist() == cells.astype(object).fillna("none").to_numpy().tolist()


def parts_of(n_parts: int, n_values: int) -> list[sparse.csr_matrix]:
    rng = np.random.default_rng(0)
    n_genes, n_cells = 1000, n_values // 100
    genes = np.sort(rng.permuted(np.tile(np.arange(n_genes), (n_cells, 1)), axis=1)[:, :100], axis=1).ravel()
    indptr = np.arange(n_cells + 1) * 100
    return [
        sparse.csr_matrix((rng.integers(1, 9, n_values).astype(np.float32), genes, indptr), (n_cells, n_genes))
        for _ in range(n_parts)
    ]


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.zarr"])
def test_joining_takes_the_memory_of_few_parts(tmp_path: Path, monkeypatch, name) -> None:
    monkeypatch.setattr(_download, "_SHARD", 2**17)
    parts = parts_of(20, 200_000)
    download = _download.Download(tmp_path / name, {})
    rows = np.split(np.arange(20 * 2000), 20)
    download.fetch(rows, lambda ids: parts[ids[0] // 2000])
    adata = AnnData(
        obs=pd.DataFrame(index=np.arange(40_000).astype(str)), var=pd.DataFrame(index=np.arange(1000).astype(str))
    )
    expected, of_a_part = sparse.vstack(parts, format="csr"), parts[0].data.nbytes + parts[0].indices.nbytes
    tracemalloc.start()
    download.join(adata, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * of_a_part, f"{peak / of_a_part:.1f} parts"
    found = ad.read_h5ad(tmp_path / name) if name.endswith(".h5ad") else ad.read_zarr(tmp_path / name)
    assert (found.X != expected).nnz == 0
