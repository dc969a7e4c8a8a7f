"""The column that pp.split writes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm.datasets import toy
from scllm.pp import split


def test_shares_and_names(adata):
    split(adata, fractions=(0.8, 0.1, 0.1))
    assert adata.obs["split"].cat.categories.tolist() == ["train", "validation", "test"]
    assert adata.obs["split"].value_counts().to_dict() == {"train": 48, "validation": 6, "test": 6}
    split(adata)
    assert adata.obs["split"].value_counts().to_dict() == {"train": 58, "validation": 2}


def test_groups_stay_whole(adata):
    adata.obs["donor"] = [f"d{i % 7}" for i in range(60)]
    split(adata, fractions=(0.7, 0.3), group_key="donor")
    assert (adata.obs.groupby("donor", observed=True)["split"].nunique() == 1).all()
    assert set(adata.obs["split"]) == {"train", "validation"}


def test_labels_are_split_alike(adata):
    split(adata, fractions=(0.5, 0.5), stratify="cell_type")
    assert (pd.crosstab(adata.obs["cell_type"], adata.obs["split"]) == 15).all(axis=None)


def test_the_seed_decides(adata):
    parts = [split(adata, fractions=(0.5, 0.5), random_state=seed, copy=True).obs["split"] for seed in (0, 0, 1)]
    pd.testing.assert_series_equal(parts[0], parts[1])
    assert (parts[0] != parts[2]).any()
    assert "split" not in adata.obs


def test_bad_requests_write_nothing(adata):
    with pytest.raises(KeyError, match="Did you mean 'batch'"):
        split(adata, group_key="batsh")
    with pytest.raises(ValueError, match=naming("group_key='batch'", "stratify='cell_type'")):
        split(adata, group_key="batch", stratify="cell_type")
    with pytest.raises(ValueError, match=naming("'batch'", 3, "got 2")):
        split(adata, group_key="batch", fractions=(0.6, 0.2, 0.2))
    assert "split" not in adata.obs
    assert not adata.uns


def test_the_column_is_in_the_order_of_the_cells(adata):
    split(adata, fractions=(0.5, 0.5), key_added="part")
    assert len(adata.obs["part"]) == 60
    runs = np.flatnonzero(np.diff(adata.obs["part"].cat.codes))
    assert len(runs) > 10  # not the first half and the second


def test_a_part_without_cells_is_a_warning():
    cells = toy(n_cells=10, n_genes=20)
    with pytest.warns(UserWarning, match=naming("10 cells", "(0.97, 0.03)", "validation")):
        split(cells)
    assert (cells.obs["split"] == "train").all()
