"""Weights that fall with the rank of a gene in its cell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scllm import datasets, models
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.models.rank_weights import rank_weights

cells_of_values = st.lists(st.lists(st.integers(0, 9), max_size=30), min_size=1, max_size=5)


def slowly(values: list[float], how: str = "ranked") -> np.ndarray:
    """One rank at a time: each of equal values gets the mean over all ranks that they span."""
    order = np.argsort([-value for value in values], kind="stable")
    edges = np.arange(len(values) + 1)
    # the integrals of (1 + r / 100)^-2 and of 1 - r / n
    integral = 100 * edges / (100 + edges) if how == "ranked" else edges - edges**2 / (2 * max(len(values), 1))
    by_rank = dict(zip(order, np.diff(integral), strict=True))
    alike = {value: np.mean([by_rank[i] for i, other in enumerate(values) if other == value]) for value in set(values)}
    found = np.array([alike[value] for value in values])
    return found / found.sum()


def weights(cells: list[list[float]], how: str = "ranked") -> list[np.ndarray]:
    cell = torch.repeat_interleave(torch.arange(len(cells)), torch.tensor([len(values) for values in cells]))
    found = rank_weights(cell, torch.tensor([value for values in cells for value in values]).float(), len(cells), how)
    return [found[cell == i].numpy() for i in range(len(cells))]


@pytest.mark.parametrize("how", ["ranked", "linear"])
@given(cells=cells_of_values)
def test_equal_values_share_the_weights_of_their_ranks(how, cells):
    for values, found in zip(cells, weights(cells, how), strict=True):
        if values:
            np.testing.assert_allclose(found, slowly(values, how), rtol=1e-5)


@given(cells_of_values, st.randoms(use_true_random=False))
def test_neither_the_order_of_genes_nor_other_cells_matter(cells, random):
    for values, together in zip(cells, weights(cells), strict=True):
        order = list(range(len(values)))
        random.shuffle(order)
        (alone,) = weights([[values[i] for i in order]])
        np.testing.assert_allclose(alone, together[order], rtol=1e-6)


@pytest.mark.parametrize("how", ["ranked", "linear"])
def test_without_values_genes_stand_in_falling_order(how):
    cell = torch.tensor([0, 0, 0, 2, 2])
    found = rank_weights(cell, None, 3, how)
    np.testing.assert_allclose(found[:3], slowly([3, 2, 1], how), rtol=1e-6)
    np.testing.assert_allclose(found[3:], slowly([2, 1], how), rtol=1e-6)


def test_linear_weights_are_in_proportion_to_how_far_a_gene_is_from_the_lowest():
    found = rank_weights(torch.tensor([0, 0, 0, 1]), None, 2, "linear")
    np.testing.assert_allclose(found, [5 / 9, 3 / 9, 1 / 9, 1], rtol=1e-6)


@pytest.mark.parametrize("how", ["ranked", "linear"])
def test_a_random_part_of_a_cell_weighs_like_the_whole(how):
    rng = np.random.default_rng(0)
    whole = torch.arange(900.0).flip(0)
    state = torch.exp(-torch.arange(900.0) / 80)  # of some meaning to the highest genes
    expected = (rank_weights(torch.zeros(900, dtype=torch.long), whole, 1, how) * state).sum()
    found = []
    for _ in range(300):
        kept = np.sort(rng.choice(900, 300, replace=False))
        weight = rank_weights(torch.zeros(300, dtype=torch.long), whole[kept], 1, how, spacing=torch.tensor([3.0]))
        found.append(float((weight * state[kept]).sum()))
    assert np.mean(found) == pytest.approx(float(expected), rel=0.02)


def test_linear_weights_end_where_sentences_are_cut():
    rng = np.random.default_rng(0)
    values = torch.arange(900.0).flip(0)
    state = torch.exp(-torch.arange(900.0) / 80)
    cut = (rank_weights(torch.zeros(300, dtype=torch.long), values[:300], 1, "linear", longest=300) * state[:300]).sum()
    found = []
    for _ in range(300):
        kept = np.sort(rng.choice(900, 300, replace=False))
        cell, spacing = torch.zeros(300, dtype=torch.long), torch.tensor([3.0])
        weight = rank_weights(cell, values[kept], 1, "linear", spacing=spacing, longest=300)
        assert not weight[101:].any()
        found.append(float((weight * state[kept]).sum()))
    assert np.mean(found) == pytest.approx(float(cut), rel=0.02)


@pytest.mark.parametrize("max_len", [500, 11])
def test_spacing_is_of_the_genes_that_have_a_rank(max_len):
    cells = datasets.toy(n_cells=12)
    model = models.build("geneformer", vocab=list(cells.var_names), size="tiny")
    medians = np.ones(len(model.vocab))
    medians[::2] = np.nan  # never seen expressed: left out, whatever the length
    source = open_source(cells)
    encoder = replace(model.encoder, max_len=max_len, medians=medians)
    loader = Loader(source, np.arange(12), genes.match(source.genes, model.vocab), encoder, model.vocab, 12)
    ((batch,),) = loader.epoch(0)
    has_rank = np.isfinite(medians)[model.vocab.ids(cells.var_names)]
    n_ranked = (cells.X.toarray()[:, has_rank] > 0).sum(1)
    expected = n_ranked / np.minimum(n_ranked, max_len - encoder.n_specials)
    np.testing.assert_allclose(np.sort(batch.spacing), np.sort(expected), rtol=1e-6)


def test_genes_that_only_a_deeper_cell_shows_hardly_count():
    shallow, deep = weights([list(range(1000, 500, -1)), list(range(1000, -1000, -1))])
    # of an equal mean the first 500 genes would be a quarter
    assert deep[:500].sum() > 0.85
    np.testing.assert_allclose(deep[:500] / deep[:500].sum(), shallow, rtol=1e-5)
