"""Networks of genes: links against slower ways, scores beside expression, groups and files."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from messages import naming

from scllm import models, tl
from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.data.tokens import Tokens
from scllm.models.base import Batch
from scllm.tl import _network_baselines
from scllm.tl._gene_links import Reader


@pytest.fixture(autouse=True)
def _small_forests(monkeypatch):
    monkeypatch.setattr(_network_baselines, "_N_TREES", 5)


def reader_of(adata, model):
    source = open_source(adata)
    found = match(source.genes, model.vocab, var=source.var)
    return Reader(model, source, found, found.measured, "cpu", "fp32")


def cells_of(adata, model):
    source = open_source(adata)
    found = match(source.genes, model.vocab, var=source.var)
    tokens = model.encoder(found.tokens(source.read(slice(None))), model.vocab, measured=found.measured)
    return [Batch.from_tokens(tokens.slice(i, i + 1)) for i in range(len(tokens))]


@torch.no_grad()
def test_attention_is_the_mean_rank_over_heads_and_cells(adata, tiny):
    adata = adata[:4].copy()
    total, n = np.zeros((40, 40)), np.zeros((40, 40))
    for cell in cells_of(adata, tiny):
        x = tiny.blocks[0](tiny.inputs(cell), cell)
        (weights,) = tiny.blocks[1].attention.weights(x, cell)
        genes = cell.genes[1:].numpy()
        for query in range(len(genes)):
            ranks = [pd.Series(head[1 + query, 1:].numpy()).rank().to_numpy() - 1 for head in weights]
            total[genes, genes[query]] += np.mean(ranks, axis=0) / (len(genes) - 1)
            n[genes, genes[query]] += 1
    with np.errstate(invalid="ignore"):
        expected = total / n
    np.fill_diagonal(expected, np.nan)
    found = reader_of(adata, tiny).attention(np.arange(4), -1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_deletions_are_changes_of_predictions_one_cell_at_a_time(adata, tiny):
    adata = adata[:3].copy()
    everything = torch.arange(40)
    total, n = np.zeros((40, 40)), np.zeros(40)
    for cell in cells_of(adata, tiny):
        before = tiny.reconstruct_genes(cell, everything)[0]
        for place in range(1, len(cell.genes)):
            kept = [i for i in range(len(cell.genes)) if i != place]
            tokens = Tokens(np.array([0, len(kept)]), cell.genes[kept].numpy(), cell.values[kept].numpy())
            change = tiny.reconstruct_genes(Batch.from_tokens(tokens), everything)[0] - before
            total[int(cell.genes[place])] += change.numpy()
            n[int(cell.genes[place])] += 1
    found = reader_of(adata, tiny).deletions(np.arange(3))
    expected = np.divide(total, n[:, None], out=np.full((40, 40), np.nan), where=n[:, None] > 0)
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_similarity_finds_planted_programmes(adata, tiny):
    with torch.no_grad():
        tiny.gene_embedding.weight.normal_(0, 0.1)
        for program in range(4):
            tiny.gene_embedding.weight[program * 10 : program * 10 + 10, program] += 2
    tl.infer_grn(adata, tiny, method="similarity", n_edges=5)
    programme = adata.var["grn_programme"].astype(str)
    assert programme.nunique() == 4
    assert all(programme.iloc[i * 10 : i * 10 + 10].nunique() == 1 for i in range(4))
    assert (np.diff(adata.varp["grn"].indptr) == 5).all()
    table = adata.uns["scllm"]["grn"]["table"]
    assert (table["source"].map(programme) == table["target"].map(programme)).all()


def test_scores_stand_beside_networks_of_expression(adata, tiny):
    reference = [("gene_20", f"gene_{i}") for i in range(21, 26)]
    tl.infer_grn(adata, tiny, reference=pd.DataFrame(reference, columns=["source", "target"]))
    scores = adata.uns["scllm"]["grn"]["scores"].set_index("method")
    assert list(scores.index) == ["attention", "correlation", "partial correlation", "random forest"]
    assert scores.loc["correlation", "auroc"] > 0.7  # gene_20 drives them
    assert (scores["n_pairs"] == 39).all()
    assert (scores["n_edges"] == 5).all()


def test_heads_are_chosen_on_other_sources_than_scored(adata, tiny):
    reference = [(f"gene_{a}", f"gene_{b}") for a in (0, 1, 10, 11, 20, 21) for b in (2, 12, 22)]
    tl.infer_grn(adata, tiny, reference=reference, select_heads=True)
    entry = adata.uns["scllm"]["grn"]
    assert entry["params"]["head"] in range(2)
    assert (entry["scores"]["n_pairs"] == 3 * 39).all()


def test_groups_are_contrasted_with_a_control_and_compared(adata, tiny, tmp_path):
    tl.infer_grn(adata, tiny, groupby="cell_type", n_edges=4)
    assert set(adata.varp) == {"grn_A", "grn_B"}
    dynamics = adata.uns["scllm"]["grn"]["dynamics"].set_index("gene")
    a, b = (set(adata.varp[f"grn_{name}"][3].indices) for name in "AB")
    assert dynamics.loc["gene_3", "change"] == pytest.approx(1 - len(a & b) / len(a | b))
    tl.infer_grn(adata, tiny, groupby="cell_type", control="B", n_edges=4)
    assert set(adata.varp) == {"grn"}
    reader = reader_of(adata, tiny)
    rows = [np.flatnonzero(adata.obs["cell_type"] == name) for name in "AB"]
    expected = np.subtract(*(reader.attention(cells, -1) for cells in rows))
    found = adata.varp["grn"].tocoo()
    np.testing.assert_allclose(found.data, expected[found.row, found.col], atol=1e-6)
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    assert (back.varp["grn"] != adata.varp["grn"]).nnz == 0
    back[:, :10].copy().write_h5ad(tmp_path / "b.h5ad")


@pytest.mark.parametrize("method", ["attention", "similarity", "perturb"])
def test_order_of_cells_and_genes_does_not_matter(adata, tiny, method):
    other = adata[::-1, ::-1].copy()
    for one in (adata, other):
        tl.infer_grn(one, tiny, method=method, n_edges=3, fdr=0.99)
        assert one.varp["grn"].nnz
    weights = [pd.DataFrame(one.varp["grn"].toarray(), one.var_names, one.var_names) for one in (adata, other)]
    np.testing.assert_allclose(weights[1].loc[adata.var_names, adata.var_names], weights[0], rtol=1e-2, atol=1e-4)


def test_copy_and_backed_data(adata, tiny, tmp_path):
    changed = tl.infer_grn(adata, tiny, n_edges=3, copy=True)
    assert "grn" not in adata.varp
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    tl.infer_grn(backed, tiny, n_edges=3)
    assert (backed.varp["grn"] != changed.varp["grn"]).nnz == 0
    backed.file.close()


@pytest.mark.parametrize(
    ("options", "error", "values"),
    [
        ({"method": "magic"}, ValueError, ["'magic'", "'attention'"]),
        ({"n_edges": 0}, ValueError, ["n_edges", "0"]),
        ({"fdr": 2}, ValueError, ["fdr", "2"]),
        ({"control": "A"}, TypeError, ["'A'", "groupby"]),
        ({"groupby": "cell_type", "control": "C"}, KeyError, ["'C'"]),
        ({"genes": ["nothing"]}, KeyError, ["'nothing'"]),
        ({"reference": [("x", "y")]}, ValueError, ["x -> y"]),
        ({"select_heads": True}, TypeError, ["reference"]),
        ({"reference": []}, ValueError, ["reference", "[]"]),
        ({"reference": "edges.csv"}, ValueError, ["reference", "'edges.csv'"]),
        ({"genes": []}, ValueError, ["genes", "empty"]),
        ({"block": 50}, ValueError, ["block", "50"]),
        ({"method": "perturb", "genes": ["gene_1", "gene_2"]}, ValueError, ["12", "2", "'perturb'"]),
        (
            {"select_heads": True, "reference": [("gene_1", "gene_2"), ("gene_1", "gene_3")]},
            ValueError,
            ["2 sources", "1 sources"],
        ),
        ({"max_cells": 0}, ValueError, ["max_cells", "0"]),
    ],
)
def test_bad_input_raises(adata, tiny, options, error, values):
    with pytest.raises(error, match=naming(*values)):
        tl.infer_grn(adata, tiny, **options)
    assert "scllm" not in adata.uns


def test_reference_genes_that_are_not_in_the_network_are_listed(adata, tiny):
    with pytest.warns(UserWarning, match=naming("1 of 2", "'gene_x'")):
        tl.infer_grn(adata, tiny, reference=[("gene_1", "gene_2"), ("gene_x", "gene_2")])


def test_each_group_has_its_programmes(adata, tiny):
    tl.infer_grn(adata, tiny, method="similarity", groupby="cell_type", n_edges=3)
    assert {"grn_A_programme", "grn_B_programme"} <= set(adata.var)


def test_families_without_attention_weights_are_named(adata):
    model = models.build("gpt2", vocab=adata.var_names, size="tiny")
    with pytest.raises(ValueError, match=naming("gpt2", "similarity")):
        tl.infer_grn(adata, model)
    with pytest.warns(UserWarning, match=naming("'nothing'")):
        tl.infer_grn(adata, model, method="similarity", genes=["gene_20", "gene_21", "nothing"], max_cells=5)
    with pytest.warns(UserWarning, match=naming("significant")):
        tl.infer_grn(adata, model, method="perturb", fdr=1e-9, max_cells=5)
