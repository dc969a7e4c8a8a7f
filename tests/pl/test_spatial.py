"""Plots of predicted expression and of the comparison."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from messages import naming

import scllm


@pytest.fixture
def predicted():
    adata = scllm.datasets.toy_spatial(n_sections=2, side=6, n_genes=16)
    truth = np.log1p(adata.X.multiply(1e4 / adata.X.sum(1)).toarray())
    adata.layers["predicted"] = (truth + 0.5).astype(np.float32)
    return adata


def test_measured_and_predicted_share_their_colours(predicted):
    axes = scllm.pl.spatial_prediction(predicted, gene="gene2", section="section2", show=False)
    measured, guess, difference = (ax.collections[0] for ax in axes)
    rows = (predicted.obs["section"] == "section2").to_numpy()
    np.testing.assert_allclose(guess.get_array(), predicted.layers["predicted"][rows, 2], rtol=1e-5)
    np.testing.assert_allclose(guess.get_array() - measured.get_array(), 0.5, atol=1e-4)
    np.testing.assert_allclose(difference.get_array(), 0.5, atol=1e-4)
    assert measured.get_clim() == guess.get_clim()
    assert difference.get_clim()[0] == -difference.get_clim()[1]
    assert all(len(ax.images) == 1 for ax in axes)
    # y of an image grows downwards
    assert all(ax.get_ylim()[0] > ax.get_ylim()[1] for ax in axes)
    plain = scllm.pl.spatial_prediction(predicted, gene="gene2", image=False, show=False)
    assert all(len(ax.images) == 0 for ax in plain)


def test_what_is_not_there_is_named(predicted):
    with pytest.raises(KeyError, match=naming("gene99")):
        scllm.pl.spatial_prediction(predicted, gene="gene99", show=False)
    with pytest.raises(KeyError, match=naming("section9")):
        scllm.pl.spatial_prediction(predicted, gene="gene1", section="section9", show=False)
    with pytest.raises(KeyError, match=naming("guess", "predict_spatial")):
        scllm.pl.spatial_prediction(predicted, gene="gene1", predicted="guess", show=False)
    predicted.layers["predicted"][:, 1] = np.nan
    with pytest.raises(ValueError, match=naming("'gene1'", 15)):
        scllm.pl.spatial_prediction(predicted, gene="gene1", show=False)
    with pytest.raises(KeyError, match=naming("ablate_spatial")):
        scllm.pl.plausibility_tradeoff(predicted, show=False)


def test_every_arm_is_drawn_at_its_scores():
    table = pd.DataFrame(
        {
            "n_train_groups": [1, 2, 2, 2],
            "arm": ["none", "ridge", "none", "feature"],
            "pcc": [0.1, 0.3, 0.25, 0.26],
            "correlation_error": [0.5, 0.4, 0.45, 0.35],
            "pcc_difference": [np.nan, 0.05, np.nan, 0.01],
            "pcc_low": [np.nan, 0.03, np.nan, -0.01],
            "pcc_high": [np.nan, 0.07, np.nan, 0.02],
        }
    )
    ax = scllm.pl.plausibility_tradeoff(table, show=False)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["ridge regression", "no plausibility term", "feature"]
    points = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in ax.containers}
    assert points["feature"] == [0.26, 0.35]
    (segment,) = ax.containers[2].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.24, 0.27])
    with pytest.raises(ValueError, match=naming(3, "[1, 2]")):
        scllm.pl.plausibility_tradeoff(table, n_train_groups=3, show=False)
