"""Bars and densities hold the data."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from messages import naming
from scipy import sparse

from scllm.pl import _tokens, bin_distribution, gene_coverage, reconstruction


@pytest.fixture
def matched(adata):
    lost = pd.DataFrame({"gene": ["low", "high", "middle"], "mean_expression": [0.1, 5.0, 1.0]})
    entry = {"id_type": "symbol", "n_matched": 30, "coverage": 0.75, "n_data": 40, "n_vocab": 60, "table": lost}
    adata.uns["scllm"] = {"match_genes": {"params": {}, **entry}}
    return adata


@pytest.fixture
def binned(adata):
    rng = np.random.default_rng(0)
    bins = adata.X.copy()
    bins.data = rng.integers(1, 11, bins.nnz).astype(np.uint8)
    adata.layers["binned"] = bins
    predicted = bins.astype(np.float32)
    predicted.data += rng.normal(0, 1, bins.nnz).astype(np.float32)
    adata.layers["reconstructed"] = predicted
    return adata


def test_coverage_bars_are_the_shares(matched) -> None:
    axes = gene_coverage(matched, show=False)
    widths = [bar.get_width() for bar in axes[0].patches]
    np.testing.assert_allclose(widths, [30 / 40, 30 / 60, 10 / 40, 30 / 60])
    assert "30 of 40 genes (75 %)" in [text.get_text() for text in axes[0].texts]
    assert axes[0].get_title() == "coverage 75 % (symbol)"


def test_lost_genes_come_most_expressed_first(matched) -> None:
    axes = gene_coverage(matched, n_lost=2, show=False)
    assert [tick.get_text() for tick in axes[1].get_yticklabels()] == ["high", "middle"]
    assert [bar.get_width() for bar in axes[1].patches] == [5.0, 1.0]


def test_coverage_without_lost_genes_is_drawn(matched) -> None:
    matched.uns["scllm"]["match_genes"]["table"] = matched.uns["scllm"]["match_genes"]["table"][:0]
    axes = gene_coverage(matched, show=False)
    axes[0].figure.canvas.draw()
    assert axes[1].get_title() == "all genes matched"


def test_coverage_before_matching_says_what_to_call(adata) -> None:
    with pytest.raises(KeyError, match=r"Call scllm\.pp\.match_genes"):
        gene_coverage(adata, show=False)


def test_histogram_holds_every_bin(binned) -> None:
    axes = bin_distribution(binned, show=False)
    dense = binned.layers["binned"].toarray()
    counts = np.array([(dense == k).sum() for k in range(11)])
    assert axes[0].patches[0].get_height() == pytest.approx(counts[0] / dense.size)
    drawn = axes[1].patches[0].get_data()
    np.testing.assert_allclose(drawn.values, counts[1:] / counts[1:].sum())
    np.testing.assert_allclose(drawn.edges, np.arange(0.5, 11))


def test_groups_have_a_row_each(binned) -> None:
    axes = bin_distribution(binned, group_key="batch", show=False)
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["first", "second"]
    strips = axes[1].collections[0].get_array()
    for row, name in enumerate(["first", "second"]):
        dense = binned[binned.obs["batch"] == name].layers["binned"].toarray()
        counts = np.array([(dense == k).sum() for k in range(11)])
        assert axes[0].patches[row].get_width() == pytest.approx(counts[0] / dense.size)
        np.testing.assert_allclose(strips[row], counts[1:] / counts[1:].sum())


def test_explicit_zeros_belong_to_the_zero_bin() -> None:
    bins = sparse.csr_matrix((np.array([0, 2, 2], np.uint8), [0, 1, 2], [0, 3]), shape=(1, 4))
    assert _tokens._count_bins(bins, 3).tolist() == [2, 0, 2]


def test_missing_layer_is_named(adata) -> None:
    adata.layers["bined"] = adata.X
    with pytest.raises(KeyError, match=r"'binned' is not in adata\.layers\. Did you mean 'bined'.*bin_expression"):
        bin_distribution(adata, show=False)


def test_density_counts_the_entries(binned) -> None:
    ax = reconstruction(binned, truth="binned", show=False)
    true, predicted = binned.layers["binned"].data, binned.layers["reconstructed"].data
    density = ax.collections[0].get_array()
    assert density.sum() == len(true)
    # one column a true bin
    np.testing.assert_array_equal(density.sum(axis=0), np.bincount(true)[1:])
    r = np.corrcoef(true, predicted)[0, 1]
    assert f"r = {r:.2f}" in ax.get_title()
    line = next(line for line in ax.lines if line.get_label() == "mean prediction")
    np.testing.assert_allclose(line.get_ydata(), [predicted[true == k].mean() for k in range(1, 11)], rtol=1e-5)


def test_only_stored_predictions_are_compared(binned) -> None:
    predicted = binned.layers["reconstructed"].tocoo()
    kept = np.random.default_rng(1).random(predicted.nnz) < 0.3
    shape = predicted.shape
    some = sparse.csr_matrix((predicted.data[kept], (predicted.row[kept], predicted.col[kept])), shape=shape)
    binned.layers["reconstructed"] = some
    ax = reconstruction(binned, truth="binned", show=False)
    assert ax.collections[0].get_array().sum() == kept.sum()
    assert f"{kept.sum():,} entries" in ax.get_title()


@pytest.mark.parametrize("in_order", [True, False])
def test_values_are_looked_up_at_stored_positions(in_order) -> None:
    rng = np.random.default_rng(0)
    where = sparse.random(20, 30, 0.2, format="csr", random_state=rng)
    values = sparse.random(20, 30, 0.3, format="csr", random_state=rng)
    expected = values.toarray()[where.nonzero()]
    if not in_order:
        backwards = np.concatenate([np.arange(a, b)[::-1] for a, b in zip(values.indptr, values.indptr[1:])])
        values = sparse.csr_matrix((values.data[backwards], values.indices[backwards], values.indptr), shape=(20, 30))
    np.testing.assert_array_equal(_tokens._values_at(where, values), expected)
    assert not _tokens._values_at(where, sparse.csr_matrix((20, 30))).any()


def test_continuous_and_constant_values_are_drawn(binned) -> None:
    binned.layers["log"] = binned.X.log1p()
    reconstruction(binned, truth="log", show=False).figure.canvas.draw()
    binned.layers["reconstructed"].data[:] = 3
    ax = reconstruction(binned, truth=None, show=False)
    ax.figure.canvas.draw()
    assert "r = nan" in ax.get_title()


def test_empty_predictions_are_named(binned) -> None:
    binned.layers["reconstructed"] = sparse.csr_matrix(binned.shape)
    with pytest.raises(ValueError, match=r"layer .* without entries"):
        reconstruction(binned, truth="binned", show=False)


def test_truth_is_read_from_a_backed_matrix(binned, tmp_path) -> None:
    binned.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    axes = [reconstruction(cells, truth=None, show=False) for cells in (binned, backed)]
    assert axes[0].get_title() == axes[1].get_title()
    binned.X = None
    with pytest.raises(ValueError, match=naming("adata.X", None)):
        reconstruction(binned, truth=None, show=False)


def test_truth_that_is_not_there_says_how_it_comes_about(binned) -> None:
    with pytest.raises(KeyError, match=r"'reconstructed_target' is not in.*scllm\.tl\.reconstruct\(adata\).*truth="):
        reconstruction(binned, show=False)
