"""Where the genes of whole cells and of random subsets stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scllm import models
from scllm.data.encode import RankEncoder
from scllm.data.tokens import Tokens
from scllm.models.base import Batch
from scllm.models.places import places


def batch_of(lengths, spacing=None, seed=0):
    ends = np.concatenate([[0], np.cumsum(lengths)])
    genes = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    keys = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, len(lengths))
    return Batch.from_tokens(
        Tokens(ends, genes, None), keys, spacing=None if spacing is None else np.array(spacing, np.float32)
    )


def test_genes_of_whole_cells_stand_one_after_the_other():
    encoder = RankEncoder(100, cls=True, eos=True)
    expected = [0, 1, 2, 0, 1, 2, 3, 4]
    assert places(batch_of([3, 5]), encoder).tolist() == expected
    assert places(batch_of([3, 5], [1, 1]), encoder).tolist() == expected  # no subset
    assert places(batch_of([100], [3]), encoder).tolist() == list(range(100))  # as many as there is room for


@pytest.mark.parametrize("specials", [False, True])
def test_genes_of_a_subset_are_spread_over_all_places_of_the_whole_cell(specials):
    encoder = RankEncoder(60, cls=specials, eos=specials)
    n, seen = 10 + 2 * specials, np.zeros(60, int)
    for seed in range(300):
        found = places(batch_of([n], [4], seed), encoder)
        assert (found.diff() > 0).all()  # their order is kept, and no place is taken twice
        if specials:
            assert (found[0], found[-1]) == (0, 41)
        seen[found] += 1
    assert (seen[: 40 + 2 * specials] > 0).all()
    assert not seen[40 + 2 * specials :].any()


def test_a_subset_of_a_cell_with_more_genes_than_places_ends_with_the_last_place():
    assert int(places(batch_of([10], [50]), RankEncoder(60)).max()) >= 54


@pytest.mark.parametrize("family", ["geneformer", "gpt2", "albert"])
def test_models_with_learnt_places_read_a_subset_at_the_places_of_the_whole_cell(family):
    model = models.build(family, vocab=[f"g{i}" for i in range(90)], size="tiny").eval()
    batch = batch_of([30], [3])
    moved = torch.from_numpy(np.arange(30))
    with torch.no_grad():
        assert not torch.allclose(model.hidden(batch), model.hidden(batch_of([30])))
        longer = places(batch, model.encoder)
    assert longer.max() > moved.max()
