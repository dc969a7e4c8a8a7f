"""Which model a verb uses: the one passed, or the one last recorded."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from messages import naming

from scllm import models
from scllm.tl import classify, embed, embed_genes, finetune, pretrain

ANOTHER_PROCESS = """
import anndata as ad, numpy as np, scllm
adata = ad.read_h5ad("../saved.h5ad")
scllm.tl.embed(adata, key_added="again")
print(np.abs(adata.obsm["again"] - adata.obsm["X_scllm"]).max() < 1e-5)
scllm.tl.embed(ad.read_h5ad("../unsaved.h5ad"))
"""


def test_a_model_that_was_never_saved_is_remembered_in_this_process(adata, tiny, tmp_path):
    embed(adata, tiny)
    entry = adata.uns["scllm"]["model"]
    assert entry == {"family": "scgpt", "hash": tiny.hash()}
    for data in (adata, adata[:30].copy()):
        embed(data, key_added="again")
        np.testing.assert_allclose(data.obsm["again"], data.obsm["X_scllm"], atol=1e-5)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    embed(back, key_added="again")
    np.testing.assert_array_equal(back.obsm["again"], back.obsm["X_scllm"])


def test_models_with_equal_weights_and_different_encoders_are_distinguished(adata, tiny):
    other = copy.deepcopy(tiny)
    other.encoder = replace(tiny.encoder, max_len=5)
    second = adata.copy()
    embed(adata, tiny)
    embed(second, other)
    embed(adata, key_added="again")
    np.testing.assert_array_equal(adata.obsm["again"], adata.obsm["X_scllm"])
    assert (adata.obsm["X_scllm"] != second.obsm["X_scllm"]).any()


def test_an_object_that_is_no_model_is_an_error(adata, tiny):
    with pytest.raises(TypeError, match=naming("model", "AnnData", "verb(adata, model)")):
        embed(adata, adata)


def test_another_process_finds_a_saved_model_but_not_an_unsaved_one(adata, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embed(adata, tiny)
    adata.write_h5ad("unsaved.h5ad")
    tiny.save("model")  # relative, recorded as an absolute path
    embed(adata, tiny)
    assert adata.uns["scllm"]["model"]["path"] == str(tmp_path / "model")
    adata.write_h5ad("saved.h5ad")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ended = subprocess.run([sys.executable, "-c", ANOTHER_PROCESS], capture_output=True, text=True, cwd=elsewhere)
    assert ended.stdout.strip() == "True", ended.stderr
    assert f"(hash {tiny.hash()}) was never saved" in ended.stderr


def test_a_deleted_model_is_named(adata, tiny, tmp_path):
    tiny.save(tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    loaded.gene_embedding.weight.data += 1  # changes the hash, so that this process does not know the model
    loaded.save(tmp_path / "model")
    embed(adata, loaded)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=naming("adata.uns['scllm']['model']", tmp_path / "model", "exist")):
        embed(adata)


def test_the_model_used_last_is_recorded(adata, tiny):
    embed(adata, tiny)
    other = models.build("scgpt", vocab=adata.var_names, size="tiny")
    embed_genes(adata, other)
    embed(adata, key_added="again")
    assert adata.obsm["again"].shape == (60, 64)


def test_a_model_can_be_the_path_of_a_model_or_a_run(adata, tmp_path):
    model = pretrain(adata, size="tiny", epochs=1, run_dir=tmp_path / "run")
    assert adata.uns["scllm"]["model"] == {
        "path": str(tmp_path / "run" / "model"), "family": "scgpt", "hash": model.hash(),
    }  # fmt: skip
    embed(adata, model)
    for path in (tmp_path / "run", str(tmp_path / "run" / "model")):
        embed(adata, path, key_added="again")
        np.testing.assert_array_equal(adata.obsm["again"], adata.obsm["X_scllm"])
    finetune(adata, key="cell_type", epochs=1, run_dir=tmp_path / "tuned")  # starts from the recorded model
    classify(adata, tmp_path / "tuned")
    assert adata.uns["scllm"]["model"]["path"] == str(tmp_path / "tuned" / "model")


def test_no_model_a_wrong_path_and_a_headless_one_are_named(adata, tiny, tmp_path):
    with pytest.raises(ValueError, match=naming("model", "none", "adata.uns['scllm']['model']")):
        embed(adata)
    with pytest.raises(FileNotFoundError, match=naming("missing", "folder")):
        embed(adata, tmp_path / "missing")
    tiny.save(tmp_path / "model")
    embed(adata, tmp_path / "model")
    with pytest.raises(ValueError, match=naming("scgpt", tmp_path / "model", "head", "tl.finetune")):
        classify(adata)


def test_an_unfinished_run_is_not_a_model(adata, tmp_path):
    pretrain(adata, size="tiny", epochs=1, run_dir=tmp_path / "run")
    (tmp_path / "run" / "done").unlink()
    with pytest.raises(ValueError, match=naming("finished", "scllm run")):
        embed(adata, tmp_path / "run")


def test_a_model_that_changed_since_it_was_recorded_is_an_error(adata, tiny, tmp_path):
    tiny.save(tmp_path / "model")
    embed(adata, tmp_path / "model")
    other = models.build("scgpt", vocab=adata.var_names, n_layers=1, n_heads=2, d_model=16, d_hidden=16)
    other.save(tmp_path / "model")
    with pytest.raises(ValueError, match=naming(tmp_path / "model", "adata.uns['scllm']['model']", other.hash())):
        embed(adata)


def test_a_file_cannot_cause_an_import(adata, tmp_path):
    adata.uns["scllm"] = {"model": {"path": str(tmp_path), "family": "xml.dom.expatbuilder", "hash": "x"}}
    sys.modules.pop("xml.dom.expatbuilder", None)
    with pytest.raises(ValueError, match=naming("adata.uns['scllm']['model']", "'xml.dom.expatbuilder'", "'scgpt'")):
        embed(adata)
    assert "xml.dom.expatbuilder" not in sys.modules
