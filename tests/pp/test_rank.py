"""Ranks and medians against numpy, cell by cell and gene by gene."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from messages import naming
from scipy import sparse

from scllm import get
from scllm.data.medians import MedianSketch
from scllm.pp import bin_expression, gene_medians, rank_expression, tokenize


def medians_slowly(counts):
    normalised = counts / counts.sum(1, keepdims=True) * 1e4
    return np.array([np.median(column[column > 0]) if column.any() else np.nan for column in normalised.T])


def ranks_slowly(counts, medians):
    ranks = np.zeros(counts.shape, int)
    for row, out in zip(counts, ranks, strict=True):
        genes = [gene for gene in range(len(row)) if row[gene] and np.isfinite(medians[gene])]
        out[sorted(genes, key=lambda gene: -row[gene] / medians[gene])] = np.arange(len(genes)) + 1
    return ranks


def test_ranks_are_those_of_counts_over_medians_and_ties_keep_gene_order(adata):
    counts = adata.X.toarray().astype(np.float64)
    rank_expression(adata)
    np.testing.assert_array_equal(adata.layers["ranked"].toarray(), ranks_slowly(counts, medians_slowly(counts)))
    rank_expression(adata, medians=dict.fromkeys(adata.var_names, 1.0), key_added="plain")
    np.testing.assert_array_equal(adata.layers["plain"].toarray(), ranks_slowly(counts, np.ones(40)))
    assert (adata.layers["ranked"].format, adata.layers["ranked"].dtype) == ("csr", np.int32)


def test_genes_without_a_median_are_left_out(adata):
    medians = {f"gene_{i}": 1.0 + i for i in range(0, 40, 2)}
    rank_expression(adata, medians=medians)
    aligned = np.array([medians.get(gene, np.nan) for gene in adata.var_names])
    np.testing.assert_array_equal(adata.layers["ranked"].toarray(), ranks_slowly(adata.X.toarray(), aligned))


def test_medians_that_fit_no_gene_are_an_error(adata):
    with pytest.raises(ValueError, match=naming("medians", 40, "'gene_0'", "'TP53'")):
        rank_expression(adata, medians={"TP53": 1.0})
    with pytest.raises(ValueError, match=naming("medians", "got 0", "'gene_0'")):
        rank_expression(adata, medians={"gene_0": 0.0})


@pytest.mark.parametrize("verb", [rank_expression, gene_medians])
def test_logged_values_are_an_error(adata, verb):
    adata.layers["raw"] = adata.X
    adata.X = adata.X.log1p()
    with pytest.raises(ValueError, match=r"looks log-normalised .* Layer 'raw' holds counts: pass layer='raw'"):
        verb(adata)


def test_medians_in_memory_are_exact(adata):
    adata.X = sparse.csr_matrix(adata.X.multiply(np.arange(40) != 7))
    gene_medians(adata)
    expected = medians_slowly(adata.X.toarray().astype(np.float64))
    np.testing.assert_allclose(adata.var["median_expression"], expected, rtol=1e-14)
    assert np.isnan(adata.var["median_expression"].iloc[7])


def test_medians_of_files_are_right_to_within_a_128th(adata, tmp_path):
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    adata[:25].copy().write_h5ad(paths[0])
    adata[25:].copy().write_h5ad(paths[1])
    found = gene_medians(paths, target_sum=500)
    expected = medians_slowly(adata.X.toarray().astype(np.float64)) / 20
    np.testing.assert_allclose(found, expected, rtol=1 / 128)
    assert found.index.tolist() == adata.var_names.tolist()
    assert ad.read_h5ad(paths[0]).var.columns.empty


@pytest.mark.parametrize("n", [1, 2, 3, 10_000])
def test_sketches_of_parts_add_up_and_keep_their_accuracy(n):
    values = np.exp(np.random.default_rng(0).normal(0, 2, (5, n)))
    whole, parts = MedianSketch(6), [MedianSketch(6), MedianSketch(6)]
    for gene, row in enumerate(values):
        whole.add(np.full(n, gene), row)
        for part, half in zip(parts, np.array_split(row, 2), strict=True):
            part.add(np.full(len(half), gene), half)
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].medians(), whole.medians())
    np.testing.assert_allclose(whole.medians()[:5], np.median(values, axis=1), rtol=1 / 128)
    assert np.isnan(whole.medians()[5])


def test_rank_ordered_sequences_follow_the_ranks(adata):
    tokenize(adata, encoder="ranks", max_len=8)
    genes, values = get.tokens(adata)
    assert values is None
    scale = medians_slowly(adata.X.toarray().astype(np.float64))
    for row, counts in zip(genes, adata.X.toarray(), strict=True):
        strength = (counts / scale)[row]
        # medians to within a 128th: neighbours may have changed places
        assert (strength[:-1] >= strength[1:] * (1 - 1 / 32)).all()
    assert set(adata.obsm) == {"tokens"}


def test_views_backed_data_and_copies(adata, tmp_path):
    rank_expression(adata)
    expected = adata.layers["ranked"].toarray()
    medians = gene_medians(adata, copy=True).var["median_expression"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    view = rank_expression(adata[::3], medians=medians, copy=True)
    np.testing.assert_array_equal(view.layers["ranked"].toarray(), expected[::3])
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    gene_medians(backed)
    np.testing.assert_allclose(backed.var["median_expression"], medians, rtol=1 / 128)
    rank_expression(backed, key_added="again")
    np.testing.assert_array_equal(backed.layers["again"].toarray(), expected)


def test_medians_may_be_a_column_that_gene_medians_wrote(adata):
    gene_medians(adata)
    rank_expression(adata, medians="median_expression", key_added="by_column")
    rank_expression(adata, key_added="by_itself")
    assert (adata.layers["by_column"] != adata.layers["by_itself"]).nnz == 0
    with pytest.raises(KeyError, match=r"'medians' is not a column of adata\.var"):
        rank_expression(adata, medians="medians")


def test_ranks_stay_when_the_counts_are_changed_in_place(adata):
    rank_expression(adata)
    before = adata.layers["ranked"].toarray()
    adata.X.data[::2] = 0
    adata.X.eliminate_zeros()
    np.testing.assert_array_equal(adata.layers["ranked"].toarray(), before)


def test_medians_that_are_no_names_or_names_twice_are_an_error(adata):
    with pytest.raises(TypeError, match=naming("medians", "got list")):
        rank_expression(adata, medians=[1.0] * 40)
    with pytest.raises(ValueError, match=naming(1, "duplicated", "first: 'gene_0'")):
        rank_expression(adata, medians=pd.Series(1.0, index=[*adata.var_names, "gene_0"]))


@pytest.mark.parametrize("verb", [bin_expression, rank_expression, gene_medians])
def test_duplicated_genes_are_an_error(adata, verb):
    adata.var_names = ["gene_1", *adata.var_names[1:]]
    with pytest.raises(ValueError, match=naming(1, "duplicated", "first: 'gene_1'")):
        verb(adata)


@pytest.mark.parametrize("value", [-5, np.nan])
@pytest.mark.parametrize("verb", [bin_expression, rank_expression, gene_medians, tokenize])
def test_wrong_values_that_a_sample_misses_are_found_while_reading(tmp_path, verb, value):
    counts = np.random.default_rng(0).poisson(1, (6000, 6)).astype(np.float32)
    counts[1, 2] = value  # every second row is looked at before
    ad.AnnData(sparse.csr_matrix(counts)).write_h5ad(tmp_path / "a.h5ad")
    data = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match="in cell '1'"):
        verb(data)
    assert not data.obsm
    assert not data.uns


def test_medians_are_refused_where_they_could_not_be_written(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=naming("copy=True", "backed")):
        gene_medians(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"), copy=True)
