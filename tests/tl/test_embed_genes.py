"""Gene embeddings: input embeddings, and hidden states averaged over cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.models.base import Batch
from scllm.tl import embed_genes
from scllm.tl._embed import _contextual_means, _Means
from scllm.tl._model import gene_match


def states_slowly(adata, model) -> np.ndarray:
    """Hidden state of each gene in each cell, NaN where it is not expressed, ``(n_cells, n_genes, d)``."""
    genes = match(adata.var_names, model.vocab)
    tokens = model.encoder(genes.tokens(adata.X), model.vocab, measured=genes.measured)
    states = np.full((adata.n_obs, len(model.vocab), model.config.d_model), np.nan, np.float32)
    for cell in range(adata.n_obs):
        batch = Batch.from_tokens(tokens.take(np.array([cell])))
        with torch.no_grad():
            states[cell, batch.genes[1:]] = model.hidden(batch)[1:]
    return states[:, genes.token_ids]


def test_input_embeddings_are_looked_up_by_gene(adata, tiny):
    part = adata[:, ::-2].copy()
    part.var_names = ["unknown", *part.var_names[1:]]
    embed_genes(part, tiny)
    vectors = part.varm["scllm_genes"]
    assert np.isnan(vectors[0]).all()
    ids = [int(name.removeprefix("gene_")) for name in part.var_names[1:]]
    np.testing.assert_array_equal(vectors[1:], tiny.gene_embedding.weight.detach()[ids])


def test_contextual_means_are_over_the_cells_that_express_the_gene(adata, tiny):
    adata.X = sparse.csr_matrix(adata.X.multiply(np.arange(40) != 5))
    embed_genes(adata, tiny, contextual=True)
    with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning, match="Mean of empty slice"):
        expected = np.nanmean(states_slowly(adata, tiny), axis=0)
    np.testing.assert_allclose(adata.varm["scllm_genes"], expected, atol=1e-5)
    assert np.isnan(adata.varm["scllm_genes"][5]).all()


def test_each_group_has_its_own_means_and_unlabelled_cells_are_ignored(adata, tiny):
    adata.obs["group"] = pd.Categorical(np.array(["x/y", "b", None], dtype=object)[np.arange(60) % 3])
    embed_genes(adata, tiny, groupby="group")
    names = adata.uns["scllm"]["embed_genes"]["table"]["group"].tolist()
    assert names == ["b", "x/y"]
    assert adata.varm["scllm_genes"].shape == (40, 2, 16)
    states = states_slowly(adata, tiny)
    for place, name in enumerate(names):
        cells = (adata.obs["group"] == name).to_numpy()
        np.testing.assert_allclose(adata.varm["scllm_genes"][:, place], np.nanmean(states[cells], axis=0), atol=1e-5)


def test_a_missing_group_offers_close_names_and_writes_nothing(adata, tiny):
    with pytest.raises(KeyError, match=r"'celltype' is not a column of adata\.obs\. Did you mean 'cell_type'"):
        embed_genes(adata, tiny, groupby="celltype")
    assert not len(adata.varm)
    assert not adata.uns
    assert "scllm_genes" in embed_genes(adata, tiny, copy=True).varm
    assert not len(adata.varm)


def test_means_are_kept_only_for_genes_in_the_data(adata, tiny):
    part = adata[:, [30, 7, 12, 3, 25, *range(31, 40)]].copy()
    source = open_source(part)
    genes = gene_match(part, source, tiny)
    means = _contextual_means(tiny, source, genes, np.zeros(60, np.int64), 1)
    assert means.shape == (14, 1, 16)
    embed_genes(part, tiny, contextual=True)
    np.testing.assert_allclose(part.varm["scllm_genes"], np.nanmean(states_slowly(part, tiny), axis=0), atol=1e-5)


def test_more_cells_than_float32_can_count_are_counted():
    means = _Means(2, 3)
    means.add(torch.zeros(2, dtype=torch.int64), torch.ones(2, 3))
    means.count[0] += 1 << 24  # as if this many cells had been added
    means.total[0] += 1 << 24
    for _ in range(3):
        means.add(torch.zeros(1, dtype=torch.int64), torch.ones(1, 3))
    assert means.count.tolist() == [(1 << 24) + 5, 0]
    assert means.so_far()[0].tolist() == [1, 1, 1]
    assert means.so_far()[1].isnan().all()
