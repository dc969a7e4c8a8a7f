"""Checks of a matrix before anything starts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from anndata import AnnData
from messages import naming
from scipy import sparse

import scllm
from scllm.data.checks import check_source, layer_with_counts, warn_of_empty_cells
from scllm.data.source import open_source


def check(adata: AnnData, needs_counts: bool = True, layer: str | None = None, **options) -> None:
    check_source(open_source(adata, layer=layer), needs_counts=needs_counts, layer=layer, **options)


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize(("value", "what"), [(-1, "negative"), (np.nan, "non-finite"), (np.inf, "non-finite")])
def test_the_first_wrong_value_is_named_with_gene_and_cell(adata, kind, value, what):
    dense = adata.X.toarray()
    dense[40, 7], dense[50, 1] = value, value
    adata.X = kind(dense)
    with pytest.raises(ValueError, match=rf"X holds {what} values \(first: \S+, gene 'gene_7' in cell 'cell_40'\)"):
        check(adata, needs_counts=False)


@pytest.mark.parametrize("stored", ["memory", "h5ad"])
def test_nothing_but_zeros_is_an_error(adata, tmp_path, stored):
    adata.layers["empty"] = adata.X * 0
    adata.write_h5ad(tmp_path / "a.h5ad")
    data = adata if stored == "memory" else tmp_path / "a.h5ad"
    with pytest.raises(ValueError, match=naming("layer 'empty'", "zeros")):
        check_source(open_source(data, layer="empty"), needs_counts=False, layer="empty")


def test_no_cells_or_no_genes_is_an_error(adata):
    with pytest.raises(ValueError, match=naming("0 cells", "40 genes")):
        check(adata[:0].copy())


def test_logged_values_are_an_error_where_counts_are_needed_and_only_there(adata):
    adata.layers["logged"] = adata.X.log1p()
    first = adata.layers["logged"].data[0]
    with pytest.raises(
        ValueError, match=rf"first: {first:.4g}, gene '\w+' in cell 'cell_0'\) and looks log-normalised \(maximum"
    ):
        check(adata, layer="logged")
    check(adata, needs_counts=False, layer="logged")


def test_advice_is_asked_for_where_it_is_needed(adata):
    asked = []
    check(adata, hint=lambda: asked.append(1) or "")
    assert not asked
    adata.X = adata.X.log1p()
    with pytest.raises(ValueError, match="look there"):
        check(adata, hint=lambda: "look there")


def test_other_non_integers_are_counted_in_a_warning(adata):
    adata.X.data[:3] += 0.5
    adata.X.data[9] = 500
    with pytest.warns(UserWarning, match=naming("X", "3 values", "1 of 60 cells", "maximum: 500")):
        check(adata)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.float64])
def test_counts_of_any_type_pass(adata, dtype):
    adata.X = adata.X.astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(adata)


def test_cells_without_a_known_gene_are_counted():
    with pytest.warns(UserWarning, match=naming("2 of 9 cells", "<cls>")):
        warn_of_empty_cells(2, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_empty_cells(0, 9)


def test_bins_and_ranks_are_not_proposed_as_counts(adata):
    scllm.pp.bin_expression(adata)
    scllm.pp.rank_expression(adata, key_added="order")
    assert layer_with_counts(adata) == ""
    adata.layers["raw"] = adata.X.copy()
    assert layer_with_counts(adata) == "Layer 'raw' holds counts: pass layer='raw'."


@pytest.mark.parametrize("make", [lambda x: x - 2, lambda x: 0 * x])
def test_negative_values_and_zeros_name_the_layer_that_holds_counts(make):
    adata = AnnData(np.ones((3, 2), np.float32))
    adata.layers["umi"] = adata.X.copy()
    adata.X = make(adata.X)
    with pytest.raises(ValueError, match=naming("X", "layer='umi'")):
        check_source(open_source(adata), needs_counts=False, layer=None, hint=lambda: layer_with_counts(adata))


def test_only_negative_values_are_blamed_on_scaling():
    for value, is_scaled in ((np.nan, False), (-1, True)):
        with pytest.raises(ValueError, match="gene '0' in cell '0'") as raised:
            check(AnnData(np.full((2, 2), value, np.float32)))
        assert ("Scaled" in str(raised.value)) is is_scaled
