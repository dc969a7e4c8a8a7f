"""Recognising counts, scaled counts, logarithms and other values from the values within cells."""

from __future__ import annotations

import warnings
from itertools import product

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scllm.data.checks import check_source, layer_with_counts
from scllm.data.source import open_source
from scllm.data.value_kind import as_counts, is_log_like, is_near_integer, value_kind
from scllm.kernels.thinning import thin

SCALES = ("1", "noise", "0.93", "1e4", "1e6", "median")
LOGS = {"plain": None, "log1p": 1.0, "log2": np.log(2), "log10": np.log(10)}


def scaled(counts: sparse.csr_matrix, scale: str, seed: int = 0) -> sparse.csr_matrix:
    """Counts as a file may hold them."""
    values = counts.astype(np.float64)
    if scale == "noise":
        values.data *= 1 + np.random.default_rng(seed).uniform(-6e-5, 6e-5, values.nnz)
        return values
    if scale in ("1", "0.93"):
        return values * float(scale)
    totals = np.asarray(values.sum(1)).ravel()
    target = np.median(totals[totals > 0]) if scale == "median" else float(scale)
    return sparse.csr_matrix(sparse.diags(target / np.maximum(totals, 1)) @ values)


def logged(values: sparse.csr_matrix, log: str) -> sparse.csr_matrix:
    values = values.copy()
    if LOGS[log] is not None:
        values.data = np.log1p(values.data) / LOGS[log]
    return values


def expected(scale: str, log: str) -> str:
    if log != "plain":
        return "logged"
    return "counts" if scale in ("1", "noise") else "scaled"


@pytest.mark.parametrize(
    "name", ["pbmc68k_reduced_counts", "pbmc_5k_citeseq_200cells", "pancreas_2studies", "perturb_papalexi2021_subset"]
)
def test_real_cells_are_told_apart_by_their_shape_whatever_their_maximum(shared, name):
    counts = sparse.csr_matrix(ad.read_h5ad(shared / "data" / f"{name}.h5ad").X)
    rng = np.random.default_rng(0)
    subsets = {
        "all genes": counts,
        "765 genes": counts[:, rng.permutation(counts.shape[1])[:765]],
        "one cluster": counts[np.argsort(-counts[:, 0].toarray().ravel(), kind="stable")[:60]],
    }
    for scale, log, subset, dtype in product(SCALES, LOGS, subsets, (np.float32, np.float64)):
        chosen = subsets[subset]
        # normalised over all genes, of which some are left
        values = scaled(counts, scale)
        values = values[:, rng.permutation(values.shape[1])[:765]] if subset == "765 genes" else scaled(chosen, scale)
        seen = value_kind(sparse.csr_matrix(logged(values, log), dtype=dtype))
        assert seen == expected(scale, log), (scale, log, subset, dtype)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32), st.sampled_from(SCALES), st.sampled_from(list(LOGS)), st.integers(30, 200),
    st.floats(0.7, 5), st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_generated_cells_are_told_apart_by_their_shape(seed, scale, log, n_genes, mean, dtype):
    rng = np.random.default_rng(seed)
    rates = rng.lognormal(0, 1, n_genes) * mean
    counts = sparse.csr_matrix(rng.poisson(rates, (40, n_genes)))
    values = logged(scaled(counts, scale, seed), log)
    assert value_kind(sparse.csr_matrix(values, dtype=dtype)) == expected(scale, log)


def test_scaled_counts_of_few_genes_are_not_taken_for_integers_because_they_are_large():
    counts = sparse.csr_matrix(np.random.default_rng(0).poisson(1.5, (40, 30)))
    values = sparse.csr_matrix(scaled(counts, "1e6"), dtype=np.float32)
    assert values.data.min() > 5_000
    assert value_kind(values) == "scaled"
    assert np.array_equal(as_counts(values).data, values.data)


def test_pbmc68k_reduced_raw_is_logged_though_765_genes_are_kept_to_3_decimals():
    import scanpy as sc

    raw = sc.datasets.pbmc68k_reduced()
    assert value_kind(sparse.csr_matrix(raw.raw.X)) == "logged"
    with pytest.raises(ValueError, match=r"looks log-normalised \(maximum 6\.489\)"):
        check_source(open_source(raw, layer="raw"), needs_counts=True, layer="raw")


def soup_corrected(counts: sparse.csr_matrix, share: float) -> sparse.csr_matrix:
    """Counts less what the ambient profile explains, as SoupX gives them."""
    values = counts.astype(np.float64)
    totals, profile = np.asarray(values.sum(1)).ravel(), np.asarray(values.sum(0)).ravel()
    ambient = share * np.repeat(totals, np.diff(values.indptr)) * (profile / profile.sum())[values.indices]
    values.data = np.maximum(values.data - ambient, 0)
    values.eliminate_zeros()
    return values


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_ambient_corrected_counts_are_taken_with_a_warning_that_counts_them_whole_or_by_cluster(shared, share):
    adata = ad.read_h5ad(shared / "data" / "pbmc_kang2018_ifnb_labelled.h5ad")
    adata.X = soup_corrected(sparse.csr_matrix(adata.X), share)
    for part in (adata, adata[adata.obs["cell_type"] == adata.obs["cell_type"].iloc[0]].copy()):
        n_odd = int((~is_near_integer(part.X.data)).sum())
        with pytest.warns(UserWarning, match=rf"X holds {n_odd:,} values that are not integers, in [\d,]+ of"):
            check_source(open_source(part), needs_counts=True, layer=None)


def test_scaled_counts_of_one_cluster_with_a_low_maximum_are_taken_with_a_warning(adata):
    adata.X = adata.X * 0.93
    part = adata[adata.obs["cell_type"] == "A"].copy()
    assert part.X.max() < 20
    with pytest.warns(UserWarning, match=r"in 30 of 30 cells .* normalised or scaled counts"):
        check_source(open_source(part), needs_counts=True, layer=None)


@pytest.mark.parametrize("distribution", ["uniform", "gamma"])
@pytest.mark.parametrize("n_genes", [5, 40, 300])
def test_denoised_values_are_neither_scaled_nor_logged(distribution, n_genes):
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 5, (30, n_genes)) if distribution == "uniform" else rng.gamma(0.5, 2, (30, n_genes))
    assert value_kind(sparse.csr_matrix(values)) == "other"


def test_cells_that_are_logged_are_found_among_cells_of_counts(adata):
    half = sparse.vstack([adata.X[:40], adata.X[40:].log1p()], format="csr")
    assert value_kind(half) == "logged"


def test_floating_point_noise_of_counts_is_taken_off_cell_by_cell():
    counts = sparse.csr_matrix(np.array([[1, 0, 3], [250, 1, 0], [0, 0, 0], [2, 5, 7]], np.float64))
    noisy = counts.copy()
    noisy.data *= 1 + np.array([2e-7, -6e-5, 6e-5, 9e-4, 1e-6, 0, 0])
    np.testing.assert_array_equal(as_counts(noisy).toarray(), counts.toarray())
    other = noisy.copy()
    other.data[0] = 1.4  # this cell holds no counts, and stays as it is
    np.testing.assert_array_equal(as_counts(other).toarray()[0], other.toarray()[0])
    np.testing.assert_array_equal(as_counts(other).toarray()[1:], counts.toarray()[1:])
    assert as_counts(counts) is counts


def test_counts_with_noise_pass_without_a_word(adata):
    adata.X = scaled(adata.X, "noise").astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_source(open_source(adata), needs_counts=True, layer=None)


def test_values_to_be_logged_again_are_told_from_logged_ones(adata):
    assert not is_log_like(adata.X)
    assert not is_log_like(adata.X * 0.93)
    assert is_log_like(adata.X.log1p())
    assert is_log_like(adata.X.toarray() - 1)  # centred
    assert not is_log_like(adata.X * 0)


def test_counts_are_found_in_x_in_a_layer_in_raw_and_in_files(adata, tmp_path):
    counts, adata.X = adata.X, adata.X.log1p()
    adata.layers["normalised"] = counts * 0.5
    assert layer_with_counts(adata) == ""
    adata.raw = ad.AnnData(counts, var=adata.var)
    assert layer_with_counts(adata) == "adata.raw holds counts: pass layer='raw'."
    assert "adata.X = adata.raw[:, adata.var_names].X" in layer_with_counts(adata, into_x=True)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "b.zarr")
    for data in (
        tmp_path / "a.h5ad",
        [tmp_path / "a.h5ad", tmp_path / "b.zarr"],
        ad.read_h5ad(tmp_path / "a.h5ad", "r"),
    ):
        assert "pass layer='raw'" in layer_with_counts(data)
    adata.layers["raw"] = counts
    assert layer_with_counts(adata) == "Layer 'raw' holds counts: pass layer='raw'."
    adata.X = counts
    assert layer_with_counts(adata, "normalised") == "X holds counts: leave `layer=` out."


def test_thinning_rounds_what_is_no_integer():
    indptr, ids, keys = np.array([0, 2]), np.array([0, 1], np.int32), np.array([1], np.int64)
    of_float = thin(indptr, ids, np.array([99.999, 0.93]), keys, 0.5)
    of_count = thin(indptr, ids, np.array([100.0, 1.0]), keys, 0.5)
    assert [part.tolist() for part in of_float] == [part.tolist() for part in of_count]
