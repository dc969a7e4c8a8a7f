"""The recipe against scanpy's steps done by hand."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from messages import naming
from scipy import sparse

from scllm.datasets import toy
from scllm.pp import bin_expression, recipe_scgpt


@pytest.fixture
def cells() -> ad.AnnData:
    adata = toy(n_cells=200, n_genes=100)
    adata.X = sparse.csr_matrix(adata.X.multiply(np.arange(100) != 3))
    return adata


def by_hand(adata, *, n_top_genes, batch_key=None, flavor="seurat_v3", min_gene_counts=3, min_genes=None):
    sc.pp.filter_genes(adata, min_counts=min_gene_counts)
    if min_genes is not None:
        sc.pp.filter_cells(adata, min_genes=min_genes)
    adata.layers["counts"] = adata.X.copy()
    if flavor in ("seurat", "cell_ranger"):
        sc.pp.normalize_total(adata, target_sum=1e4)
        sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes, batch_key=batch_key, flavor=flavor)
    adata = adata[:, adata.var["highly_variable"]].copy()
    adata.X = adata.layers["counts"].copy()
    sc.pp.normalize_total(adata, target_sum=1e4)
    adata.uns.pop("log1p", None)
    sc.pp.log1p(adata)
    return adata


@pytest.mark.parametrize(
    "options",
    [
        {}, {"batch_key": "batch"}, {"flavor": "seurat"}, {"flavor": "cell_ranger", "batch_key": "batch"},
        {"min_genes": 40, "min_gene_counts": 60},
    ],
)  # fmt: skip
def test_recipe_is_what_scanpy_does(cells, options):
    expected = by_hand(cells.copy(), n_top_genes=30, **options)
    recipe_scgpt(cells, n_top_genes=30, **options)
    assert cells.var_names.tolist() == expected.var_names.tolist()
    assert cells.obs_names.tolist() == expected.obs_names.tolist()
    assert (cells.X != expected.X).nnz == 0
    assert (cells.layers["counts"] != expected.layers["counts"]).nnz == 0
    bin_expression(expected, layer="counts")
    assert (cells.layers["binned"] != expected.layers["binned"]).nnz == 0
    assert cells.n_obs < 200 if "min_genes" in options else cells.n_obs == 200


@pytest.mark.parametrize("kind", [sparse.csc_matrix, np.asarray, "int32"])
def test_every_kind_of_counts_gives_the_same(cells, kind):
    other = cells.copy()
    other.X = other.X.astype(kind) if isinstance(kind, str) else kind(other.X.toarray())
    recipe_scgpt(cells, n_top_genes=30)
    recipe_scgpt(other, n_top_genes=30)
    np.testing.assert_array_equal(other.var_names, cells.var_names)
    np.testing.assert_allclose(ad.AnnData(other.X).to_df(), ad.AnnData(cells.X).to_df(), rtol=1e-6)
    assert (other.layers["binned"] != cells.layers["binned"]).nnz == 0


def test_more_genes_than_there_are_keeps_all_that_pass(cells):
    recipe_scgpt(cells, n_top_genes=1200)
    assert cells.n_vars == 99  # one has no counts
    assert "gene3" not in cells.var_names


def test_a_copy_leaves_the_original_alone(cells):
    before = cells.copy()
    changed = recipe_scgpt(cells, n_top_genes=30, copy=True)
    assert changed.n_vars == 30
    assert (cells.shape, list(cells.layers), list(cells.uns)) == (before.shape, [], list(before.uns))
    assert (cells.X != before.X).nnz == 0


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"flavor": "seuratv3"}, ("flavor", "got 'seuratv3'", "'seurat_v3'")),
        ({"n_top_genes": 0}, ("n_top_genes=0", "target_sum=10000.0")),
        ({"target_sum": 0}, ("n_top_genes=30", "target_sum=0")),
        ({"n_bins": 1}, ("n_bins", "got 1", 2)),
        ({"min_gene_counts": 10**9}, ("min_gene_counts=1000000000", "0 genes", "200 cells")),
        ({"min_genes": 101}, ("min_genes=101", "99 genes", "0 cells")),
        ({"batch_key": "single"}, ("obs['single']", "2 cells", "'a' has 1")),
        ({"batch_key": "missing"}, ("obs['missing']", "5 cells")),
        ({"batch_key": "few"}, ("flavor='seurat_v3'", "3 cells in 'a'", "flavor='seurat'")),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_goes_wrong_changes_nothing(cells, options, values):
    for name, n in {"single": 1, "few": 3}.items():
        cells.obs[name] = pd.Categorical(["a"] * n + ["b"] * (200 - n))
    cells.obs["missing"] = pd.Categorical([None] * 5 + ["a"] * 195)
    before = cells.copy()
    with pytest.raises(ValueError, match=naming(*values)):
        recipe_scgpt(cells, **{"n_top_genes": 30, **options})
    assert (cells.shape, list(cells.layers), list(cells.uns)) == (before.shape, [], list(before.uns))
    assert (cells.X != before.X).nnz == 0


def test_a_second_call_says_where_the_counts_are(cells):
    recipe_scgpt(cells, n_top_genes=30)
    with pytest.raises(ValueError, match=r"looks log-normalised .* adata\.layers\['counts'\]"):
        recipe_scgpt(cells, n_top_genes=30)


def test_backed_data_are_asked_into_memory(cells, tmp_path):
    cells.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"adata\.to_memory\(\)"):
        recipe_scgpt(ad.read_h5ad(tmp_path / "a.h5ad", backed="r"))


@pytest.mark.filterwarnings("ignore:Some cells have zero counts")
def test_parity_scgpt_logged_values(shared):
    expected = np.load(shared / "parity" / "scgpt" / "preprocess.npz")
    adata = ad.AnnData(sparse.csr_matrix(expected["pre_counts"]))
    recipe_scgpt(adata, min_gene_counts=0)
    assert adata.shape == expected["pre_counts"].shape
    np.testing.assert_allclose(adata.X.toarray(), expected["pre_log1p"], rtol=1e-6)
    # the original's logarithm worked in place: its layer of normalised values holds the logged ones
    np.testing.assert_array_equal(expected["pre_normed"], expected["pre_log1p"])
    fixed = expected["pre_digit_lo"] == expected["pre_digit_hi"]
    np.testing.assert_array_equal(adata.layers["binned"].toarray()[fixed], expected["pre_binned"][fixed])


def test_duplicated_genes_are_an_error(adata):
    adata.var_names = ["same", "same", *adata.var_names[2:]]
    with pytest.raises(ValueError, match="'same'"):
        recipe_scgpt(adata, n_top_genes=20)


def test_samples_in_which_nothing_varies_are_an_error_and_change_nothing(cells):
    alike = cells.copy()
    alike.X = sparse.csr_matrix(np.repeat(cells.X[0].toarray(), 200, axis=0))
    with pytest.raises(ValueError, match=naming(4, "200 cells", "got 0")):
        recipe_scgpt(alike, n_top_genes=10)
    cells.X = sparse.csr_matrix(sparse.vstack([cells.X[[0, 0, 0]], cells.X[3:]]))
    cells.obs["sample"] = [7] * 3 + [8] * 197
    with pytest.raises(ValueError, match=naming(4, "3 cells of sample '7'", "got 0")):
        recipe_scgpt(cells, n_top_genes=10, batch_key="sample")
    assert cells.shape == (200, 100)
    assert not cells.layers


@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat", "cell_ranger"])
def test_samples_may_be_numbers(cells, flavor):
    cells.obs["number"] = np.arange(200) % 2
    cells.obs["name"] = cells.obs["number"].map({0: "a", 1: "b"})
    by_number, by_name = (
        recipe_scgpt(cells, n_top_genes=20, batch_key=key, flavor=flavor, copy=True) for key in ("number", "name")
    )
    assert by_number.var_names.tolist() == by_name.var_names.tolist()
    assert by_number.n_vars == 20


def test_sparse_arrays_and_doubled_entries_give_the_same(cells):
    expected = recipe_scgpt(cells, n_top_genes=20, copy=True)
    as_array, doubled = cells.copy(), cells.copy()
    as_array.X = sparse.csr_array(cells.X)
    parts = cells.X.tocoo()
    half = np.floor(parts.data / 2)
    entries = np.concatenate([half, parts.data - half])
    places = np.tile(np.argsort(parts.row, kind="stable"), 2)
    order = np.argsort(parts.row[places], kind="stable")
    doubled.X = sparse.csr_matrix(
        (entries[order].astype(np.float32), parts.col[places][order], 2 * cells.X.indptr), shape=cells.shape
    )
    for other in (as_array, doubled):
        recipe_scgpt(other, n_top_genes=20)
        assert other.var_names.tolist() == expected.var_names.tolist()
        np.testing.assert_allclose(other.X.toarray(), expected.X.toarray(), rtol=1e-6)
        np.testing.assert_array_equal(other.layers["binned"].toarray(), expected.layers["binned"].toarray())
