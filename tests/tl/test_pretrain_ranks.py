"""Pretraining on ranked token sequences, and verbs on a model that reads no values."""

from __future__ import annotations

import numpy as np
import pytest
from engine.runs import interrupted, pretrain
from messages import naming

from scllm import models, tl
from scllm.data.medians import token_medians
from scllm.data.source import open_source
from scllm.tl import TrainConfig
from scllm.tl._model import gene_match

TINY = {"size": "tiny", "epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def trained(_planted, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "r"
    return tl.pretrain(_planted.copy(), "geneformer", run_dir=run_dir, validation=0.1, **TINY | {"epochs": 30})


def test_the_loss_falls_below_that_of_guessing_and_says_what_it_is(trained):
    history = trained.history
    training = history.loc[history["split"] == "train", "loss"]
    # With 40 genes, guessing has a loss of log 40 nats. Masks and gene subsets change in every epoch.
    assert training.iloc[-20:].mean() < 0.99 * np.log(40)
    assert set(history.loc[history["split"] == "train", "mask_ratio"]) == {0.15}


def test_medians_of_the_training_cells_are_part_of_the_model(trained, adata):
    again = models.load(trained.path)
    rows = np.load(trained.path.parent / "cells.npz")["train"]
    source = open_source(adata)
    expected = token_medians(source, gene_match(adata, source, trained), rows, 44)
    np.testing.assert_array_equal(again.encoder.medians, expected)
    assert np.isnan(expected[:4]).all()
    assert np.isfinite(expected[4:]).all()


def test_verbs_use_a_rank_based_model(trained, adata):
    tl.embed(adata, trained)
    assert adata.obsm["X_scllm"].shape == (60, 64)
    tl.embed_genes(adata, contextual=True)
    assert np.isfinite(adata.varm["scllm_genes"]).all()
    tl.reconstruct(adata, mask_ratio=0.2)
    probability = adata.layers["reconstructed"].data
    assert ((0 < probability) & (probability < 1)).all()
    assert len(probability) == sum(int(0.2 * n) for n in np.diff(adata.X.indptr))
    tuned = tl.finetune(adata, key="cell_type", epochs=10, batch_size=16)
    tl.classify(adata, tuned)
    assert (adata.obs["scllm_label"] == adata.obs["cell_type"]).mean() > 0.8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"left_out": 0.2}, TypeError, naming("left_out=0.2", "geneformer", "MaskedGene")),
        ({"mask_ratio": (0.1, 0.2)}, TypeError, naming("mask_ratio=(0.1, 0.2)", "geneformer", "MaskedGene")),
        ({"mask_ratio": 1.5}, ValueError, naming("p", 1.5)),
    ],
)
def test_settings_of_other_families_are_an_error(adata, options, error, message):
    with pytest.raises(error, match=message):
        tl.pretrain(adata, "geneformer", **TINY, **options)


def test_logged_values_are_an_error_that_names_the_layer_with_counts(adata):
    adata.layers["raw"] = adata.X
    adata.X = adata.X.log1p()
    with pytest.raises(ValueError, match="Layer 'raw' holds counts: pass layer='raw'"):
        tl.pretrain(adata, "geneformer", **TINY)


def test_training_reads_gene_subsets_and_downsampled_counts(adata):
    config = TrainConfig(max_len=10, downsample=0.5, gene_init="svd")
    model = tl.pretrain(adata, "geneformer", config=config, mask_ratio=0.3, **TINY)
    assert np.isfinite(model.history["loss"]).all()
    assert model.encoder.max_len == model.config.max_len == 2048
    assert model.history["mask_ratio"].dropna().unique().tolist() == [0.3]


def test_two_processes_have_the_loss_curve_of_one_and_a_resumed_run_too(adata, tmp_path):
    options = TINY | {"epochs": 2, "dropout": 0.0, "device": "cpu", "validation": 0.1}
    one = tl.pretrain(adata.copy(), "geneformer", run_dir=tmp_path / "one", n_procs=1, **options)
    two = tl.pretrain(adata.copy(), "geneformer", run_dir=tmp_path / "two", n_procs=2, **options)
    np.testing.assert_allclose(two.history["loss"], one.history["loss"], rtol=1e-5)
    options |= {"model": "geneformer", "config": {"save_every": 2}}
    interrupted(adata.copy(), tmp_path / "broken", 3, **options)
    again = pretrain(adata.copy(), tmp_path / "broken", **options)
    np.testing.assert_array_equal(again.history["loss"], one.history["loss"])


def test_pretraining_an_existing_model_keeps_its_medians(trained, adata):
    further = tl.pretrain(adata[:30].copy(), trained, epochs=1, batch_size=16)
    np.testing.assert_array_equal(further.encoder.medians, trained.encoder.medians)
    assert further.hash() != trained.hash()
