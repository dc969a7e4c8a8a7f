"""Expression as the model sees it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scllm import models
from scllm.data.genes import match
from scllm.data.tokens import Tokens
from scllm.engine.objectives import MaskedValue
from scllm.models.base import Batch
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
def test_only_hidden_genes_are_predicted_and_without_their_values(adata, tiny, ratio):
    reconstruct(adata, tiny, mask_ratio=ratio)
    layer = adata.layers["reconstructed"]
    np.testing.assert_array_equal(np.diff(layer.indptr), np.floor(np.diff(adata.X.indptr) * ratio))
    assert not (layer.astype(bool) > adata.X.astype(bool)).nnz
    for cell in range(10):
        batch, hidden = sentence(adata, tiny, cell), layer[cell].indices
        places = [int((batch.genes == gene).nonzero()) for gene in hidden]
        np.testing.assert_allclose(layer[cell].data, predicted_slowly(tiny, batch, places)[places], atol=1e-5)


def test_the_same_genes_are_hidden_again(adata, tiny):
    first = reconstruct(adata, tiny, mask_ratio=0.5, copy=True).layers["reconstructed"]
    reconstruct(adata, tiny, mask_ratio=0.5, key_added="mine")
    assert (adata.layers["mine"] != first).nnz == 0
    assert "reconstructed" not in adata.layers


def test_another_seed_hides_other_genes(adata, tiny):
    first, again, other = (
        reconstruct(adata, tiny, mask_ratio=0.5, random_state=seed, copy=True).layers["reconstructed"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.toarray(), again.toarray())
    assert (first.astype(bool) != other.astype(bool)).nnz > first.nnz / 2


@torch.no_grad()
def test_chosen_genes_are_predicted_from_the_cell_expressed_or_not(adata, tiny):
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
        ({"mask_ratio": 1.0}, ValueError, "mask_ratio is 1.0, a share between 0 and 1"),
        ({"genes": ["gene_1", "TP53"]}, KeyError, "'TP53' is not a gene of both the data and the model"),
        ({"genes": ["gene_1"], "mask_ratio": 0.5}, TypeError, "genes= and mask_ratio="),
        ({"genes": ["gene_1"], "copy": True}, TypeError, "genes= and copy=True .* are returned, .* Leave one out"),
        ({"genes": ["gene_1"], "key_added": "mine"}, TypeError, "genes= and key_added='mine' are both given"),
        ({"target_depth": 1e4}, ValueError, "target_depth=10000.0 goes with models"),
    ],
)
def test_requests_that_cannot_be_met_write_nothing(adata, tiny, options, error, message):
    with pytest.raises(error, match=message):
        reconstruct(adata, tiny, **options)
    assert not len(adata.layers)
    assert not adata.uns


def test_parity_scgpt_number_of_hidden_values(shared):
    """The original counts <cls> among the positions it hides from; we do not, so we hide as many or one fewer."""
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
