"""One workflow through the library on data with a known structure."""

from __future__ import annotations

import numpy as np
import pytest

import scllm


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Pretrain and embed, fine-tune on three quarters of the cells, and predict labels."""
    folder = tmp_path_factory.mktemp("story")
    adata = scllm.datasets.toy(n_cells=400, n_genes=100)
    scllm.pp.split(adata, fractions=(0.6, 0.15, 0.25), stratify="cell_type")
    model = scllm.tl.pretrain(
        adata, size="tiny", epochs=4, lr=3e-3, batch_size=8, validation="split", run_dir=folder / "pretrained"
    )
    scllm.tl.embed(adata)
    tuned = scllm.tl.finetune(
        adata, key="cell_type", epochs=10, lr=3e-4, batch_size=16, validation="split", run_dir=folder / "tuned"
    )
    scllm.tl.classify(adata)
    return adata, model, tuned


def test_pretraining_lowers_the_loss(story):
    _, model, _ = story
    validation = model.history.query("split == 'validation'")["loss"]
    assert len(validation) == 4
    assert validation.iloc[-1] < validation.iloc[0]


def test_labels_of_held_out_cells_are_far_better_than_chance(story):
    adata, _, tuned = story
    tested = adata[adata.obs["split"] == "test"]
    right = tested.obs["scllm_label"].astype(str) == tested.obs["cell_type"].astype(str)
    assert len(right) == 100
    assert right.mean() > 0.7  # chance is 0.25
    assert tuned.history.query("split == 'validation'")["accuracy"].max() > 0.7
    assert adata.obs["scllm_label_prob"][tested.obs_names][right].mean() > 0.4


def test_the_fine_tuned_embedding_is_compared_with_principal_components(story):
    adata, model, tuned = story
    # pooling as in the classification head, whose input fine-tuning adapts to the labels
    for name, one in {"X_pretrained": model, "X_tuned": tuned}.items():
        scllm.tl.embed(adata, one, pooling="ranked", key_added=name)
    names = ["X_pretrained", "X_tuned", "X_pca"]
    table = scllm.tl.benchmark(adata, use_rep=names, key="cell_type", batch_key="batch")
    assert table.index.tolist() == names
    assert np.isfinite(table["overall"]).all()
    assert table.loc["X_tuned", "bio"] > table.loc["X_pretrained", "bio"]


def test_masked_expression_is_predicted_better_than_by_its_mean(story):
    adata, model, _ = story
    scllm.pp.bin_expression(adata)
    scllm.tl.reconstruct(adata, model, mask_ratio=0.5)
    predicted = adata.layers["reconstructed"].tocoo()
    truth = np.asarray(adata.layers["binned"][predicted.row, predicted.col], float).ravel()
    assert np.corrcoef(predicted.data, truth)[0, 1] > 0.3
    assert ((predicted.data - truth) ** 2).mean() < 0.95 * truth.var()


def test_results_can_be_plotted_and_written(story, tmp_path):
    adata, model, tuned = story
    for source in (model, adata, [model.path.parent, tuned.path.parent]):
        assert np.size(scllm.pl.loss_curves(source, show=False)) >= 1
    assert scllm.pl.confusion_matrix(adata, truth="cell_type", predicted="scllm_label", show=False) is not None
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
