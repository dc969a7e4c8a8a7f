"""The simulated sections hold what they say."""

from __future__ import annotations

import numpy as np
import pytest
from messages import naming

import scllm


def test_image_shows_half_of_the_programmes():
    adata = scllm.datasets.toy_spatial(n_sections=2, side=16)
    tiles = np.vstack(
        [
            library["images"]["hires"].reshape(16, 16, 16, 16, 3).swapaxes(1, 2).reshape(256, -1, 3)
            for library in adata.uns["spatial"].values()
        ]
    ).astype(float)
    is_nucleus = tiles.mean(2) < 115
    tone = np.stack([(tile[~dark]).mean(0) for tile, dark in zip(tiles, is_nucleus, strict=True)])
    seen = np.column_stack([tone, is_nucleus.mean(1), np.ones(len(tone))])
    programmes = adata.obsm["programmes"].astype(float)
    residual = programmes - seen @ np.linalg.lstsq(seen, programmes, rcond=None)[0]
    explained = 1 - residual.var(0) / programmes.var(0)
    assert (explained[:4] > 0.9).all()
    assert (explained[4:] < 0.2).all()


def test_genes_follow_their_programme():
    adata = scllm.datasets.toy_spatial(n_sections=2, side=16)
    logged = np.log1p(adata.X.toarray())
    programme = adata.uns["toy_spatial"]["programme"]
    found = np.corrcoef(logged.T, adata.obsm["programmes"].T)[:80, 80:]
    assert (found.argmax(1) == programme).mean() > 0.95
    again = scllm.datasets.toy_spatial(n_sections=2, side=16)
    assert (again.X != adata.X).nnz == 0
    assert adata.obsm["spatial"].max() < 256


def test_too_small_sections_are_an_error():
    with pytest.raises(ValueError, match=naming("side=3")):
        scllm.datasets.toy_spatial(side=3)
