"""Predicted expression and its targets."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from messages import naming
from scipy import sparse

from scllm import models
from scllm.data.genes import match
from scllm.data.tokens import Tokens
from scllm.engine.objectives import MaskedValue
from scllm.models.base import Batch
from scllm.pl import reconstruction
from scllm.pp import bin_expression, match_genes
from scllm.tl import reconstruct


def sentence(adata, model, cell) -> Batch:
    genes = match(adata.var_names, model.vocab)
    tokens = model.encoder(genes.tokens(adata.X[[cell]]), model.vocab, measured=genes.measured)
    return Batch.from_tokens(tokens)


@torch.no_grad()
def predicted_slowly(model, batch, hidden=()):
    values = batch.values.clone()
    values[list(hidden)] = -1
    return model(batch.with_values(values)).heads["value"]


def test_every_expressed_gene_is_predicted(adata, tiny):
    reconstruct(adata, tiny)
    layer = adata.layers["reconstructed"]
    assert layer.format == "csr"
    np.testing.assert_array_equal(layer.indptr, adata.X.indptr)
    np.testing.assert_array_equal(layer.indices, adata.X.indices)
    for cell in range(10):
        np.testing.assert_allclose(layer[cell].data, predicted_slowly(tiny, sentence(adata, tiny, cell))[1:], atol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_only_masked_genes_are_predicted_and_without_their_values(adata, tiny, ratio):
    reconstruct(adata, tiny, mask_ratio=ratio)
    layer = adata.layers["reconstructed"]
    np.testing.assert_array_equal(np.diff(layer.indptr), np.floor(np.diff(adata.X.indptr) * ratio))
    assert not (layer.astype(bool) > adata.X.astype(bool)).nnz
    for cell in range(10):
        batch, hidden = sentence(adata, tiny, cell), layer[cell].indices
        places = [int((batch.genes == gene).nonzero()) for gene in hidden]
        np.testing.assert_allclose(layer[cell].data, predicted_slowly(tiny, batch, places)[places], atol=1e-5)


def test_the_same_seed_masks_the_same_genes(adata, tiny):
    first = reconstruct(adata, tiny, mask_ratio=0.5, copy=True).layers["reconstructed"]
    reconstruct(adata, tiny, mask_ratio=0.5, key_added="mine")
    assert (adata.layers["mine"] != first).nnz == 0
    assert "reconstructed" not in adata.layers


def test_another_seed_masks_other_genes(adata, tiny):
    first, again, other = (
        reconstruct(adata, tiny, mask_ratio=0.5, random_state=seed, copy=True).layers["reconstructed"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.toarray(), again.toarray())
    assert (first.astype(bool) != other.astype(bool)).nnz > first.nnz / 2


@pytest.fixture
def twins(adata):
    """`adata` with gene_0 in two columns; a cell expresses one, both or neither of them."""
    counts = adata.X.toarray()
    halves = np.floor(counts[:, [0]] / 2)
    names = ["gene_0", *adata.var_names[1:], "twin"]
    data = AnnData(
        sparse.csr_matrix(np.hstack([counts[:, [0]] - halves, counts[:, 1:], halves])), obs=adata.obs,
        var=pd.DataFrame({"symbol": [*adata.var_names, "gene_0"]}, index=names),
    )  # fmt: skip
    match_genes(data, [f"gene_{i}" for i in range(40)], gene_key="symbol")
    return data


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_columns_that_share_a_token_get_equal_values_where_expressed(adata, twins, tiny, ratio):
    reconstruct(adata, tiny, mask_ratio=ratio)
    reconstruct(twins, tiny, mask_ratio=ratio)
    expected, found = adata.layers["reconstructed"].toarray(), twins.layers["reconstructed"].toarray()
    is_there = twins.X.toarray() > 0
    np.testing.assert_allclose(found[:, :40], np.where(is_there[:, :40], expected, 0), atol=1e-5)
    np.testing.assert_allclose(found[:, 40], np.where(is_there[:, 40], expected[:, 0], 0), atol=1e-5)
    assert (is_there[:, 0] & is_there[:, 40] & (found[:, 0] != 0)).any()


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_targets_are_written_in_the_units_of_the_model(adata, tiny, ratio):
    # bins of half of the genes differ from bins of all genes
    model = models.build("scgpt", vocab=adata.var_names[::2], size="tiny", n_layers=1)
    reconstruct(adata, model, mask_ratio=ratio)
    predicted, target = adata.layers["reconstructed"], adata.layers["reconstructed_target"]
    np.testing.assert_array_equal(predicted.indices, target.indices)
    known = adata[:, ::2].copy()
    bin_expression(known)
    own = known.layers["binned"].toarray()
    there = target[:, ::2].toarray() > 0
    np.testing.assert_array_equal(target[:, ::2].toarray(), np.where(there, own, 0))
    bin_expression(adata)
    assert (adata.layers["binned"][:, ::2].toarray()[there] != own[there]).any()
    ax = reconstruction(adata, show=False)
    r = np.corrcoef(predicted.data, target.data)[0, 1]
    assert f"r = {r:.2f}" in ax.get_title()


def test_models_without_values_write_no_targets(adata, tiny):
    reconstruct(adata, tiny)
    reconstruct(adata, models.build("geneformer", vocab=adata.var_names, size="tiny", n_layers=1))
    assert set(adata.layers) == {"reconstructed"}
    with pytest.raises(KeyError, match="'reconstructed_target' is not in"):
        reconstruction(adata, show=False)


@torch.no_grad()
def test_chosen_genes_are_predicted_in_every_cell_from_its_embedding(adata, tiny):
    names = ["gene_30", "gene_2"]
    table = reconstruct(adata, tiny, genes=names)
    assert table.shape == (60, 2)
    assert table.columns.tolist() == names
    assert (table.index == adata.obs_names).all()
    for cell in range(10):
        batch = sentence(adata, tiny, cell)
        state = tiny.hidden(batch)[:1]
        ids = torch.tensor([30, 2])
        expected = tiny.decode_cell(state, ids, torch.zeros(2, dtype=torch.long), batch)["cell_value"]
        np.testing.assert_allclose(table.iloc[cell], expected, atol=1e-5)
    assert reconstruct(adata, tiny, genes="gene_2").columns.tolist() == ["gene_2"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_ratio": 1.0}, ValueError, naming("mask_ratio", "1.0")),
        ({"genes": ["gene_1", "TP53"]}, KeyError, naming("genes", "1 of 2", "'TP53'")),
        ({"genes": ["gene_1"], "mask_ratio": 0.5}, TypeError, naming("genes=", "mask_ratio=0.5")),
        ({"genes": ["gene_1"], "copy": True}, TypeError, naming("genes=", "copy=True")),
        ({"genes": ["gene_1"], "key_added": "mine"}, TypeError, naming("genes=", "key_added='mine'")),
        ({"target_depth": 1e4}, ValueError, naming("target_depth=10000.0", "scgpt")),
    ],
)
def test_requests_that_cannot_be_met_write_nothing(adata, tiny, options, error, message):
    with pytest.raises(error, match=message):
        reconstruct(adata, tiny, **options)
    assert not len(adata.layers)
    assert not adata.uns


def test_parity_scgpt_number_of_hidden_values(shared):
    """The original includes <cls> in the number of genes to mask from; we do not, and mask as many or one fewer."""
    folder = shared / "parity" / "scgpt"
    expected = np.load(folder / "tokenize.npz")
    genes, values = expected["tok_genes_zero0_cls1"], expected["tok_values_zero0_cls1"]
    ratio = float(expected["mask_ratio"])
    model = models.load(folder / "checkpoint", family="scgpt")
    real = genes != model.vocab.pad_id
    theirs = (expected["mask_values"] == -1).sum(1)
    np.testing.assert_array_equal(theirs, np.floor(ratio * real.sum(1)))
    indptr = np.concatenate([[0], np.cumsum(real.sum(1))])
    batch = Batch.from_tokens(Tokens(indptr, genes[real], values[real].astype(np.float32)), keys=np.arange(len(genes)))
    hidden = MaskedValue((ratio,)).hide(batch, model.is_special, ratio)
    ours = np.bincount(batch.cell[hidden], minlength=batch.n_cells)
    np.testing.assert_array_equal(ours, np.floor(ratio * (real.sum(1) - 1)))
    assert set(theirs - ours) == {0, 1}
    assert not model.is_special[batch.genes[hidden]].any()
