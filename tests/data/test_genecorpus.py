"""Folders of rank-ordered token sequences, written and read."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from messages import naming
from typer.testing import CliRunner

from scllm import models, tl
from scllm.cli import app
from scllm.data import genes
from scllm.data.source import open_source
from scllm.models import build, geneformer


@pytest.fixture
def folder(adata, tmp_path):
    """`adata` as `scllm genecorpus` writes it, its cell types kept."""
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["genecorpus", str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "corpus"), "--column", "cell_type"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    return tmp_path / "corpus"


def sequences(source, model):
    match = genes.match(source.genes, model.vocab, var=source.var)
    counts = match.tokens(source.read(slice(None)))
    return model.encoder(counts, model.vocab, measured=match.measured)


def test_the_folder_is_one_that_datasets_reads(adata, folder):
    corpus = datasets.load_from_disk(str(folder))
    assert corpus.column_names == ["input_ids", "length", "cell_type"]
    assert corpus["length"] == [len(ids) for ids in corpus["input_ids"]]
    assert corpus["cell_type"] == adata.obs["cell_type"].tolist()
    assert [len(ids) - 2 for ids in corpus["input_ids"]] == np.diff(adata.X.indptr).tolist()


def test_the_source_returns_the_token_sequences(folder):
    corpus, source = datasets.load_from_disk(str(folder)), open_source(folder)
    medians = dict(zip(source.vocab.tokens, source.medians, strict=True))
    # a model with other ids for the same genes
    vocab = geneformer.Config().vocab(source.genes[::-1])
    encoder = models.RankEncoder(64, True, True, np.array([medians[token] for token in vocab.tokens]))
    tokens = sequences(source, build("geneformer", vocab=vocab, encoder=encoder, size="tiny", max_len=64))
    names = [vocab.names(tokens.take(np.array([i])).genes) for i in range(len(tokens))]
    assert names == [source.vocab.names(ids) for ids in corpus["input_ids"]]
    assert source.obs(["cell_type"])["cell_type"].tolist() == corpus["cell_type"]
    rows = np.array([5, 2, 2])
    assert (source.read(rows) != source.read(slice(None))[rows]).nnz == 0


def test_pretraining_reads_the_folder_and_the_model_reads_counts(adata, folder, tmp_path):
    options = {"size": "tiny", "epochs": 1, "batch_size": 16}
    model = tl.pretrain(folder, "geneformer", run_dir=tmp_path / "run", **options)
    assert np.isfinite(model.history["loss"]).all()
    tl.embed(adata, model)
    np.testing.assert_allclose(tl.embed(folder, model), adata.obsm["X_scllm"], atol=1e-5)


def test_models_that_read_something_else_are_an_error(adata, folder):
    with pytest.raises(ValueError, match=naming(folder, "order of genes", "scgpt")):
        tl.embed(folder, build("scgpt", vocab=adata.var_names, size="tiny"))
    with torch.random.fork_rng([]):
        other = build("geneformer", vocab=adata.var_names, size="tiny")
    with pytest.raises(ValueError, match=naming(folder, "medians", "scllm genecorpus --model")):
        tl.embed(folder, other)


def test_a_folder_without_dictionaries_is_an_error(folder):
    (folder / "token_dictionary.json").unlink()
    with pytest.raises(FileNotFoundError, match=naming("token_dictionary*.json", "got 0")):
        open_source(folder)


def test_a_missing_label_stays_missing(adata, tmp_path):
    adata.obs["cell_type"] = adata.obs["cell_type"].where(np.arange(adata.n_obs) != 1)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["genecorpus", str(tmp_path / "cells.h5ad"), "--out", str(tmp_path / "corpus"), "--column", "cell_type"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    column = open_source(tmp_path / "corpus").obs(["cell_type"])["cell_type"]
    assert np.flatnonzero(column.isna()).tolist() == [1]
