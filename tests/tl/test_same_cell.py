"""Verbs say the same of a cell whatever the order of its genes and the files beside its own."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from engine.runs import assert_same_curve, curve, interrupted, pretrain
from forms import by_name

from scllm import datasets, models, tl
from scllm.data.matching import match_source
from scllm.data.source import open_source
from scllm.engine.objectives import MaskedExpression, MaskedValue
from scllm.engine.run import Run
from scllm.engine.worker import continue_run
from scllm.models.batch import Batch, Measured

FAMILIES = ("scgpt", "geneformer", "scbert", "scfoundation", "gpt2", "albert", "xlnet")
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def blood(shared):
    return ad.read_h5ad(shared / "data" / "pbmc_zheng2017_facs.h5ad")[::97].copy()


def fresh(family, genes, max_len=None, **config):
    torch.manual_seed(0)
    model = models.build(family, vocab=list(genes), size="tiny", **config).eval()
    if max_len is not None:
        model.encoder = replace(model.encoder, max_len=max_len)
    return model


@pytest.fixture
def two_files():
    """Cells in two files, each with genes that the other does not have, its genes in an order of its own."""
    cells = datasets.toy(n_cells=60, n_genes=40)
    return cells[:30, :32].copy(), cells[30:, 39:10:-1].copy()


@pytest.mark.parametrize("family", ["scgpt", "geneformer", "gpt2"])
def test_embeddings_of_real_cells_do_not_depend_on_the_order_of_columns(blood, family):
    model = fresh(family, blood.var_names, 201)
    moved = by_name(blood)
    assert (np.diff(blood.X.indptr) > 200).mean() > 0.9  # cells longer than max_len
    for adata in (blood, moved):
        tl.embed(adata, model, precision="fp32")
    np.testing.assert_allclose(moved.obsm["X_scllm"], blood.obsm["X_scllm"], **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "xlnet"])
def test_perplexity_of_real_cells_does_not_depend_on_the_order_of_columns(blood, family):
    model, few = fresh(family, blood.var_names, 65), blood[:8].copy()
    moved = by_name(few)
    for adata in (few, moved):
        tl.perplexity(adata, model)
    np.testing.assert_allclose(moved.obs["perplexity_nats"], few.obs["perplexity_nats"], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_do_not_depend_on_the_files_beside(two_files, family):
    model = fresh(family, datasets.toy(n_cells=4, n_genes=40).var_names)
    alone = [tl.embed([file], model) for file in two_files]
    together, swapped = tl.embed(list(two_files), model), tl.embed(list(two_files[::-1]), model)
    np.testing.assert_allclose(together, np.concatenate(alone), **CLOSE)
    np.testing.assert_allclose(swapped, np.concatenate(alone[::-1]), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_does_not_depend_on_the_order_of_columns(family):
    cells = datasets.toy(n_cells=40, n_genes=40)
    model = fresh(family, cells.var_names, 21)
    losses = [
        tl.pretrain(adata, model, epochs=1, dropout=0, batch_size=10).history["loss"]
        for adata in (cells, by_name(cells))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def batch_of(files, model):
    source = open_source(list(files))
    match, rows = match_source(source, model.vocab), np.arange(source.n_obs)
    tokens = model.encoder(match.tokens(source.read(rows), rows), model.vocab, measured=match.measured)
    return Batch.from_tokens(tokens, rows, measured=Measured.of(match, rows))


def asked_of_scgpt(batch, model):
    out = MaskedValue().hide(batch, model.is_special, 0.5)
    genes, cell, _ = MaskedValue()._left_out(batch, out, len(model.vocab))
    return cell[len(out) :], genes[len(out) :]


def asked_of_scfoundation(batch, model):
    expression = torch.zeros(batch.n_cells, model.n_positions)
    return MaskedExpression(zeros=0.5).asked(model, batch, expression)


@pytest.mark.parametrize(("family", "asked"), [("scgpt", asked_of_scgpt), ("scfoundation", asked_of_scfoundation)])
def test_losses_ask_for_zeros_of_genes_that_the_cells_file_measured(two_files, family, asked):
    model = fresh(family, datasets.toy(n_cells=4, n_genes=40).var_names)
    cell, genes = asked(batch_of(two_files, model), model)
    for file, of_file in zip(two_files, (cell < 30, cell >= 30), strict=True):
        assert set(genes[of_file].tolist()) == set(model.vocab.ids(file.var_names).tolist())
    alone = asked(batch_of(two_files[:1], model), model)
    assert torch.equal(torch.stack(alone), torch.stack([cell, genes])[:, cell < 30])


@pytest.mark.parametrize("family", ["scgpt", "scfoundation"])
def test_a_run_that_goes_on_with_the_copied_data_asks_for_the_same_zeros(two_files, family, tmp_path):
    model = fresh(family, datasets.toy(n_cells=4, n_genes=40).var_names)
    options = {"model": model, "dropout": 0, "left_out": 0.2 if family == "scgpt" else None}
    if family == "scgpt":
        model.encoder = replace(model.encoder, include_zeros=True)
    pretrain(list(two_files), tmp_path / "whole", **options)
    interrupted(list(two_files), tmp_path / "broken", 2, **options)
    assert (tmp_path / "broken" / "data").is_dir()
    continue_run(Run(tmp_path / "broken"), device="cpu")  # reads the copy
    assert_same_curve(curve(tmp_path / "broken"), curve(tmp_path / "whole"))
