"""``gene_key=`` and ``min_coverage=`` in every verb that takes data, for AnnData and paths alike."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
from messages import naming

import scllm
from scllm.engine.run import Run

SIZES = {"n_layers": 1, "n_heads": 2, "d_model": 8, "d_hidden": 8}


@pytest.fixture
def named(adata):
    """Cells whose genes have two sets of names that fit the model: ``var_names``, and in reverse ``other``."""
    adata.var["other"] = adata.var_names.to_numpy()[::-1].copy()
    return adata


@pytest.fixture
def model(adata):
    return scllm.models.build("scgpt", vocab=adata.var_names, **SIZES).eval()


@pytest.mark.parametrize("verb", ["pp.gene_medians", "tl.pretrain", "tl.finetune", "tl.embed", "tl.classify"])
def test_every_verb_that_takes_data_takes_both(verb):
    module, name = verb.split(".")
    known = inspect.signature(getattr(getattr(scllm, module), name)).parameters
    for option in ("gene_key", "min_coverage"):
        assert (known[option].default, known[option].kind) == (None, inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("stored", ["memory", "h5ad", "list"])
def test_embed_takes_the_names_asked_for(named, model, tmp_path, stored):
    named.write_h5ad(tmp_path / "a.h5ad")
    reverse = named.copy()
    reverse.var_names = reverse.var["other"].to_numpy()
    data = {"memory": named, "h5ad": tmp_path / "a.h5ad", "list": [tmp_path / "a.h5ad"]}[stored]
    expected = [scllm.tl.embed(one, model, copy=True).obsm["X_scllm"] for one in (named, reverse)]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    for key, embedding in zip((None, "other"), expected, strict=True):
        found = scllm.tl.embed(data, model, gene_key=key)
        found = named.obsm["X_scllm"] if found is None else found
        np.testing.assert_allclose(found, embedding, atol=1e-5)


@pytest.mark.parametrize("stored", ["memory", "h5ad"])
def test_min_coverage_is_the_callers(named, tmp_path, stored):
    few = scllm.models.build("scgpt", vocab=[*named.var_names[:8], *(f"x{i}" for i in range(40))], **SIZES).eval()
    named.write_h5ad(tmp_path / "a.h5ad")
    data = named if stored == "memory" else tmp_path / "a.h5ad"
    with pytest.raises(ValueError, match=r"8 of 40 genes \(20 %\)"):
        scllm.tl.embed(data, few)
    with pytest.warns(UserWarning, match="<cls>"):
        scllm.tl.embed(data, few, min_coverage=0.1)
    with pytest.raises(ValueError, match=r"from 0 to 1, got 30"):
        scllm.tl.embed(data, few, min_coverage=30)


def test_keywords_go_before_what_an_earlier_match_genes_left(named, model):
    scllm.pp.match_genes(named, model, gene_key="other")
    recorded = scllm.tl.embed(named, model, copy=True).obsm["X_scllm"]
    asked = scllm.tl.embed(named, model, gene_key="var_names", copy=True).obsm["X_scllm"]
    assert np.abs(recorded - asked).max() > 1e-3
    del named.uns["scllm"]
    np.testing.assert_array_equal(scllm.tl.embed(named, model, copy=True).obsm["X_scllm"], asked)
    np.testing.assert_array_equal(scllm.tl.embed(named, model, gene_key="other", copy=True).obsm["X_scllm"], recorded)


@pytest.mark.filterwarnings("ignore:.* express no gene")
def test_worker_processes_and_resumes_use_the_settings_of_the_run(named, tmp_path):
    named.var["other"] = [f"g{i}" for i in range(named.n_vars)]
    named.write_h5ad(tmp_path / "a.h5ad")
    # a process that took other names, or insisted on 30 %, would fail
    few = scllm.models.build("scgpt", vocab=[*(f"g{i}" for i in range(20, 26)), *(f"x{i}" for i in range(40))], **SIZES)
    options = {"epochs": 1, "device": "cpu", "n_procs": 2, "run_dir": tmp_path / "run", "min_coverage": 0.1}
    trained = scllm.tl.pretrain(tmp_path / "a.h5ad", few, gene_key="other", **options)
    assert Run(tmp_path / "run").is_done
    data = Run(tmp_path / "run").spec.data
    assert (data.gene_key, data.min_coverage) == ("other", 0.1)
    again = scllm.tl.pretrain(tmp_path / "a.h5ad", few, gene_key="other", **options)
    assert again.hash() == trained.hash()
    with pytest.raises(ValueError, match=naming("data.min_coverage", 0.1, 0.05)):
        scllm.tl.pretrain(tmp_path / "a.h5ad", few, gene_key="other", **options | {"min_coverage": 0.05})


def test_a_fresh_vocabulary_has_the_names_of_gene_key(named, tmp_path):
    named.var["other"] = [f"ENSG{i:011d}.{i}" for i in range(named.n_vars)]
    model = scllm.tl.pretrain(
        named, size="tiny", epochs=1, gene_key="other", run_dir=tmp_path / "run", device="cpu", n_procs=1
    )
    assert model.vocab.genes[:2] == ("ENSG00000000000", "ENSG00000000001")


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_folds_are_trained_and_tested_by_the_names_asked_for(named, model):
    reverse = named.copy()
    reverse.var_names = reverse.var["other"].to_numpy()
    options = {"key": "cell_type", "n_folds": 2, "epochs": 1, "baseline": False}
    found = scllm.tl.cross_validate(named, model, gene_key="other", **options)
    expected = scllm.tl.cross_validate(reverse, model, **options)
    pd.testing.assert_frame_equal(found, expected)
    np.testing.assert_allclose(named.obsm["cell_type_cv_probabilities"].sum(1), 1, atol=1e-5)


def test_medians_are_those_of_genes_that_share_a_name(named, tmp_path):
    named.var["other"] = [f"g{i // 2}" for i in range(named.n_vars)]
    named.var.loc["gene_39", "other"] = None
    named.write_h5ad(tmp_path / "a.h5ad")
    dense = named.X.toarray()
    normalised = dense / np.maximum(dense.sum(1, keepdims=True), 1) * 1e4
    pairs = normalised[:, ::2] + np.where(np.arange(20) < 19, normalised[:, 1::2], 0)
    expected = [np.median(column[column > 0]) for column in pairs.T]
    scllm.pp.gene_medians(named, gene_key="other")
    np.testing.assert_allclose(named.var["median_expression"].iloc[::2], expected, rtol=1e-6)
    np.testing.assert_allclose(named.var["median_expression"].iloc[1:-1:2], expected[:-1], rtol=1e-6)
    assert np.isnan(named.var["median_expression"].iloc[-1])
    streamed = scllm.pp.gene_medians(tmp_path / "a.h5ad", gene_key="other")
    assert streamed.index.tolist() == [f"g{i}" for i in range(20)]
    np.testing.assert_allclose(streamed, expected, rtol=1 / 100)
    with pytest.raises(ValueError, match=r"Only 39 of 40 genes \(97\.5 %\) have a name in var\['other'\]"):
        scllm.pp.gene_medians(named, gene_key="other", min_coverage=0.99)


def test_the_command_line_takes_both(named, model, tmp_path):
    from typer.testing import CliRunner

    from scllm.cli import app

    named.write_h5ad(tmp_path / "a.h5ad")
    model.save(tmp_path / "model")
    options = [str(tmp_path / "a.h5ad"), str(tmp_path / "model"), "--out", str(tmp_path / "x.npy")]
    done = CliRunner().invoke(app, ["embed", *options, "--gene-key", "other", "--min-coverage", "0.9"])
    assert done.exit_code == 0, done.output
    expected = scllm.tl.embed(named, model, gene_key="other", copy=True).obsm["X_scllm"]
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-5)
    wrong = CliRunner().invoke(app, ["embed", *options, "--gene-key", "othr"])
    assert wrong.exit_code == 2
    for command in ("pretrain", "finetune", "classify", "genecorpus"):
        text = CliRunner().invoke(app, [command, "--help"], terminal_width=200).output
        assert "--gene-key" in text
        assert "--min-coverage" in text
