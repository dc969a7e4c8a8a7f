"""Bins of each cell, whatever the matrix looks like."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
from forms import FORMS as MATRIX_FORMS
from messages import naming
from scipy import sparse

from scllm.kernels.binning import bin_rows
from scllm.pp import bin_expression

FORMS = {
    "csr_array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "dense": lambda x: x.toarray(),
    "float64": lambda x: x.astype(np.float64),
    "int32": lambda x: x.astype(np.int32),
    "int64 indices": lambda x: sparse.csr_matrix((x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64))),
    "stored zeros": lambda x: with_stored_zeros(x),
    "unsorted": lambda x: sparse.csr_matrix(x[:, ::-1]),
}  # fmt: skip


def with_stored_zeros(x):
    full = sparse.csr_matrix(np.ones(x.shape, np.float32))
    full.data = x.toarray().ravel()
    return full


def bins_slowly(x, n_bins, ties="middle"):
    """One dense cell."""
    edges = np.quantile(x[x > 0], np.linspace(0, 1, n_bins - 1)) if x.any() else np.zeros(1)
    upto, below = np.digitize(x, edges), np.digitize(x, edges, right=True)
    found = {"middle": (upto + below + 1) // 2, "left": np.minimum(below + 1, upto), "right": upto}[ties]
    return np.where(x > 0, found, 0)


def binned(adata, **options) -> np.ndarray:
    bin_expression(adata, **options)
    return adata.layers["binned"].toarray()


@pytest.mark.parametrize("ties", ["middle", "left", "right"])
@pytest.mark.parametrize("n_bins", [2, 51])
def test_bins_are_those_of_numpy(adata, n_bins, ties):
    adata.X = sparse.csr_matrix(adata.X.multiply((np.arange(60) != 5)[:, None]))
    expected = np.stack([bins_slowly(row, n_bins, ties) for row in adata.X.toarray()])
    np.testing.assert_array_equal(binned(adata, n_bins=n_bins, ties=ties), expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_matrix_gives_the_same_bins(adata, form):
    expected = binned(adata)
    if form == "unsorted":
        adata = adata[:, ::-1].copy()
        expected = expected[:, ::-1]
    adata.X = FORMS[form](adata.X if form != "unsorted" else adata.X[:, ::-1])
    np.testing.assert_array_equal(binned(adata), expected)
    assert adata.layers["binned"].format == "csr"
    assert adata.layers["binned"].nnz == (expected > 0).sum()


def test_views_and_files_give_the_bins_of_their_cells(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    expected = binned(adata)
    cells, genes = np.arange(60) % 3 == 0, np.arange(40)[::-1]
    assert adata[cells].is_view
    view = bin_expression(adata[cells][:, genes], copy=True)
    np.testing.assert_array_equal(view.layers["binned"].toarray(), expected[cells][:, genes])
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    np.testing.assert_array_equal(binned(backed), expected)
    assert backed.isbacked
    assert "binned" not in ad.read_h5ad(tmp_path / "a.h5ad").layers


def test_bins_of_counts_normalised_and_logged_values_are_the_same(adata):
    expected = binned(adata)
    scale = sparse.diags_array(1e4 / np.asarray(adata.X.sum(1)).ravel())
    adata.layers["normalised"] = sparse.csr_matrix(scale @ adata.X, dtype=np.float32)
    adata.layers["logged"] = adata.layers["normalised"].log1p()
    for layer in ("normalised", "logged"):
        np.testing.assert_array_equal(binned(adata, layer=layer), expected)


@pytest.mark.parametrize(("n_bins", "dtype"), [(51, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_the_smallest_type_that_holds_all_bins(adata, n_bins, dtype):
    assert binned(adata, n_bins=n_bins).max() == n_bins - 1
    assert adata.layers["binned"].dtype == dtype


def test_random_ties_are_within_bounds_and_stay_with_the_cell(adata):
    left, right = binned(adata, ties="left"), binned(adata, ties="right")
    drawn = binned(adata, ties="random")
    assert ((left <= drawn) & (drawn <= right)).all()
    assert (drawn != binned(adata, ties="middle")).any()
    np.testing.assert_array_equal(binned(adata, ties="random"), drawn)
    assert (binned(adata, ties="random", random_state=1) != drawn).any()
    order = np.random.default_rng(0).permutation(60)[:20]
    np.testing.assert_array_equal(binned(adata[order].copy(), ties="random"), drawn[order])


def test_key_layer_and_copy(adata):
    adata.layers["other"] = adata.X * 0 + adata.X.multiply(adata.X > 3)
    changed = bin_expression(adata, layer="other", key_added="mine", n_bins=5, copy=True)
    assert list(adata.layers) == ["other"]
    np.testing.assert_array_equal(changed.layers["mine"].toarray() > 0, adata.X.toarray() > 3)
    assert changed.uns["scllm"]["bin_expression"]["params"] == {
        "n_bins": 5, "layer": "other", "ties": "middle", "key_added": "mine", "random_state": 0,
    }  # fmt: skip


def test_an_unknown_layer_offers_those_there_are(adata):
    with pytest.raises(KeyError, match=naming("layer 'counts'", "adata", ".raw")):
        bin_expression(adata, layer="counts")


@pytest.fixture(scope="session")
def preprocessed(shared):
    return dict(np.load(shared / "parity" / "scgpt" / "preprocess.npz"))


@pytest.mark.parametrize("form", MATRIX_FORMS)
@pytest.mark.parametrize("values", ["pre_counts", "pre_log1p"])
def test_parity_scgpt_bins_lie_where_the_original_draws_them(preprocessed, values, form):
    adata = ad.AnnData(MATRIX_FORMS[form](preprocessed[values]))
    lowest, highest = preprocessed["pre_digit_lo"], preprocessed["pre_digit_hi"]
    there = preprocessed["pre_counts"] > 0
    np.testing.assert_array_equal(binned(adata, ties="left")[there], lowest[there])
    np.testing.assert_array_equal(binned(adata, ties="right")[there], highest[there])
    for ties in ("middle", "random"):
        bins = binned(adata, ties=ties)
        assert ((lowest <= bins) & (bins <= highest))[there].all()
        assert not bins[~there].any()
        fixed = lowest == highest
        np.testing.assert_array_equal(bins[fixed & there], preprocessed["pre_binned"][fixed & there])


@pytest.mark.parametrize(
    ("values", "expected", "seed"),
    [("pre_log1p", "pre_binned", "pre_seed"), ("adata.h5ad", "pre_binned_counts", "pre_binned_counts_seed")],
)
def test_parity_scgpt_bins_with_the_draws_of_the_original(shared, preprocessed, values, expected, seed):
    # the counts that were binned row by row have no empty row
    folder = shared / "parity" / "scgpt"
    matrix = sparse.csr_matrix(preprocessed[values] if values in preprocessed else ad.read_h5ad(folder / values).X)
    generator = np.random.RandomState(int(preprocessed[seed]))
    draws = np.concatenate([generator.rand(n) for n in np.diff(matrix.indptr) if n])
    bins = bin_rows(matrix.indptr, matrix.data, n_bins=int(preprocessed["pre_n_bins"]), ties="random", draws=draws)
    matrix.data = bins.astype(np.int64)
    np.testing.assert_array_equal(matrix.toarray(), preprocessed[expected])
