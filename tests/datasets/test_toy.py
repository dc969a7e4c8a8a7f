"""What toy() plants can be found."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from messages import naming
from scipy import sparse

from scllm.datasets import toy


@pytest.fixture(scope="module")
def planted() -> ad.AnnData:
    return toy(n_cells=2500)


def rates(adata: ad.AnnData) -> pd.DataFrame:
    """Counts per cell over the cell's total; dense, for small data only."""
    counts = adata.to_df()
    return counts.div(counts.sum(axis=1), axis=0)


def test_counts_are_integers_in_csr(planted) -> None:
    assert isinstance(planted.X, sparse.csr_matrix)
    assert planted.X.dtype == np.float32
    assert planted.X.data.min() >= 1
    assert np.array_equal(planted.X.data, np.rint(planted.X.data))
    assert planted.shape == (2500, 200)


def test_markers_are_high_in_their_type(planted) -> None:
    mean = rates(planted).groupby(planted.obs["cell_type"], observed=True).mean()
    markers = planted.uns["toy"]["markers"]
    assert set(markers["cell_type"]) == set(planted.obs["cell_type"].cat.categories)
    for gene, cell_type in markers.itertuples(index=False):
        assert mean.loc[cell_type, gene] > 4 * mean[gene].drop(cell_type).max()


def test_targets_follow_the_regulator_and_nothing_else_does(planted) -> None:
    plan, level = planted.uns["toy"], planted.obs["regulator_level"]
    correlation = rates(planted).corrwith(level, method="spearman")
    driven = [plan["regulator"], *plan["targets"]]
    assert correlation[driven].min() > 0.3
    assert correlation.drop(driven).abs().max() < 0.2


def test_batches_differ_and_cross_the_types(planted) -> None:
    depth = planted.to_df().sum(axis=1).groupby(planted.obs["batch"], observed=True).mean()
    assert depth["batch2"] < 0.8 * depth["batch1"]
    mean = rates(planted).groupby(planted.obs["batch"], observed=True).mean()
    fold = np.log(mean.loc["batch2"] / mean.loc["batch1"])
    assert 0.3 < fold.std() < 0.9
    crossed = pd.crosstab(planted.obs["cell_type"], planted.obs["batch"])
    assert crossed.to_numpy().min() > 250


def test_roles_do_not_overlap(planted) -> None:
    plan = planted.uns["toy"]
    roles = [*plan["markers"]["gene"], plan["regulator"], *plan["targets"]]
    assert len(set(roles)) == len(roles) == 4 * 10 + 1 + 10
    assert set(roles) <= set(planted.var_names)


def test_same_seed_same_data() -> None:
    first, again, other = toy(n_cells=50), toy(n_cells=50), toy(n_cells=50, random_state=1)
    assert (first.X != again.X).nnz == 0
    assert (first.X != other.X).nnz > 0


def test_toy_can_be_written(tmp_path) -> None:
    adata = toy(n_cells=20, n_genes=20)
    adata.write_h5ad(tmp_path / "toy.h5ad")
    adata.write_zarr(tmp_path / "toy.zarr")
    assert ad.read_h5ad(tmp_path / "toy.h5ad").uns["toy"]["regulator"] == adata.uns["toy"]["regulator"]


def test_too_few_genes_are_refused() -> None:
    with pytest.raises(ValueError, match=naming("n_genes=19", 20)):
        toy(n_genes=19)
