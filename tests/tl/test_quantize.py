"""Functions of tl with int8 models."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
import torch
from messages import naming

from scllm import metrics, models, settings, tl


@pytest.fixture
def wide():
    """A model whose weights are most of its saved folder."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return models.build("scgpt", vocab=[f"gene_{i}" for i in range(3000)], size="small").eval()


def test_the_saved_folder_is_more_than_three_and_a_half_times_smaller(wide, tmp_path):
    small = tl.quantize(wide)
    sizes = {}
    for name, model in (("before", wide), ("after", small)):
        model.save(tmp_path / name)
        sizes[name] = sum(os.path.getsize(tmp_path / name / file) for file in os.listdir(tmp_path / name))
        sizes[name] -= os.path.getsize(tmp_path / name / "report.json") if name == "after" else 0
    assert sizes["before"] / sizes["after"] > 3.5
    assert small.report["bytes_on_disk"].to_dict() == sizes
    assert small.report["bytes_in_memory"]["before"] / small.report["bytes_in_memory"]["after"] > 3.7


def test_the_report_has_a_row_before_and_one_after(tiny):
    report = tl.quantize(tiny).report
    assert list(report.index) == ["before", "after"]
    assert list(report.columns) == [
        "bytes_on_disk", "bytes_in_memory", "n_parameters", "flops_per_cell", "cells_per_s", "cosine_mean",
        "cosine_min", "knn_overlap",
    ]  # fmt: skip
    assert report.loc["before", ["cosine_mean", "cosine_min", "knn_overlap"]].to_numpy() == pytest.approx(1)
    assert 0.99 < report.loc["after", "cosine_min"] < 1
    assert (report["cells_per_s"] > 0).all()
    assert (report["n_parameters"] == tiny.n_parameters).all()


def test_the_report_is_saved_with_the_model(tiny, tmp_path):
    small = tl.quantize(tiny)
    small.report["accuracy"] = [0.9, np.nan]
    small.save(tmp_path / "model")
    again = models.load(tmp_path / "model").report
    pd.testing.assert_frame_equal(again, small.report, check_exact=True)
    models.load(tmp_path / "model").save(tmp_path / "again")
    assert (tmp_path / "again" / "report.json").read_text() == (tmp_path / "model" / "report.json").read_text()


def test_the_given_model_is_not_changed(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    before = tiny.hash()
    small = tl.quantize(tmp_path / "model")
    assert small.path is None
    assert small.hash() != before
    assert models.load(tmp_path / "model").hash() == before
    tl.quantize(tiny)
    assert (tiny.hash(), tiny.weight_dtype, tiny.report) == (before, "float32", None)


def test_the_encoder_stays_int8_and_heads_are_trained(adata, tiny, tmp_path):
    small = tl.quantize(tiny)
    with pytest.raises(ValueError, match=naming("int8 weights", "freeze='encoder'", "tl.quantize")):
        tl.finetune(adata, small, key="cell_type", epochs=1)
    with pytest.raises(ValueError, match=naming("int8 weights", "freeze='encoder'", "tl.quantize")):
        tl.pretrain(adata, small, epochs=1)
    assert not settings.run_dir.exists()
    heads = {"key": "cell_type", "freeze": "encoder", "epochs": 4, "lr": 1e-4}
    tuned, of_floats = tl.finetune(adata, small, **heads), tl.finetune(adata, tiny, **heads)
    np.testing.assert_allclose(tuned.history["loss"], of_floats.history["loss"], rtol=0.05)
    assert tuned.history["loss"].nunique() > 2
    assert tuned.weight_dtype == "int8"
    assert torch.equal(tuned.gene_embedding.weight_int8, small.gene_embedding.weight_int8)
    assert tuned.heads[0].weight.dtype == torch.float32
    # float heads trained on int8 weights are loaded unchanged
    tuned.save(tmp_path / "model")
    assert models.load(tmp_path / "model").hash() == tuned.hash()
    rounded_later = tl.quantize(tl.finetune(adata, tiny, key="cell_type", epochs=1), dtype="int8_dynamic")
    assert "same_label" in rounded_later.report
    assert [type(head) for head in rounded_later.heads] == [torch.nn.Linear]


def test_a_model_is_quantized_only_once(tiny):
    with pytest.raises(ValueError, match=naming("float weights", "int8")):
        tl.quantize(tl.quantize(tiny))


def test_an_unknown_dtype_is_an_error(tiny):
    with pytest.raises(ValueError, match=naming("dtype", "'int4'", "'int8'", "'int8_dynamic'")):
        tl.quantize(tiny, dtype="int4")


def test_a_recorded_int8_model_is_found_again(adata, tiny, tmp_path):
    small = tl.quantize(tiny)
    small.save(tmp_path / "model")
    tl.embed(adata, small)
    first = adata.obsm["X_scllm"].copy()
    tl.embed(adata)
    np.testing.assert_array_equal(adata.obsm["X_scllm"], first)


@pytest.mark.parametrize(("pooling", "batch_size"), [(None, 7), ("mean", 1)])
def test_embeddings_do_not_depend_on_the_batch(adata, tiny, pooling, batch_size):
    small = tl.quantize(tiny)
    whole, apart = (
        tl.embed(adata, small, pooling=pooling, batch_size=n, copy=True).obsm["X_scllm"] for n in (60, batch_size)
    )
    np.testing.assert_allclose(whole, apart, atol=1e-5)


@pytest.mark.parametrize("dtype", ["int8", "int8_dynamic"])
def test_reference_checkpoints_keep_their_embedding(shared, dtype):
    import anndata as ad

    folder = shared / "parity" / "scgpt"
    adata = ad.read_h5ad(folder / "adata.h5ad")
    model = models.load(folder / "checkpoint", family="scgpt")
    small = tl.quantize(model, dtype=dtype)
    found, reference = (tl.embed(adata, one, copy=True).obsm["X_scllm"] for one in (small, model))
    assert metrics.agreement(found, reference)["cosine_min"] > 0.999
