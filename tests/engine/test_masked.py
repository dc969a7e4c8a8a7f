"""Objectives of scBERT and scFoundation: settings and choice of tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from messages import naming

from scllm.data.tokens import Tokens
from scllm.engine.objectives import MaskedExpression, MaskedLevel, objective_from_dict, objective_to_dict
from scllm.engine.objectives.masks import drawn_share
from scllm.models.base import Batch

LENGTHS = (20, 0, 7, 13)


@pytest.fixture
def batch() -> Batch:
    indptr = np.concatenate([[0], np.cumsum(LENGTHS)])
    genes = np.concatenate([np.arange(n) for n in LENGTHS])
    return Batch.from_tokens(Tokens(indptr, genes, np.ones(40, np.float32)), keys=np.array([5, 6, 7, 8]))


@pytest.mark.parametrize("share", [0.15, 0.5, 0.99, 1.0])
def test_the_drawn_share_is_exact_in_each_cell_and_rounded_as_asked(batch, share):
    among = batch.genes > 2
    for up, rounded in ((False, math.floor), (True, math.ceil)):
        drawn = drawn_share(batch, among, share, up=up)
        wanted = [rounded(round(share * max(0, n - 3), 9)) for n in LENGTHS]
        assert torch.bincount(batch.cell[drawn], minlength=4).tolist() == wanted
        assert among[drawn].all()
        assert (drawn.diff() > 0).all()


def test_draws_depend_on_the_key_and_the_salt(batch):
    among = torch.ones(40, dtype=torch.bool)
    drawn = drawn_share(batch, among, 0.5)
    assert torch.equal(drawn, drawn_share(batch, among, 0.5))
    assert not torch.equal(drawn, drawn_share(batch, among, 0.5, salt=1))
    batch.keys = batch.keys + 1
    assert not torch.equal(drawn, drawn_share(batch, among, 0.5))


@pytest.mark.parametrize("objective", [MaskedLevel((0.2,), 0.8, 3), MaskedExpression((0.4,), 0.1, 0.7, 0.2, 3)])
def test_settings_survive_saving(objective):
    assert objective_from_dict(objective_to_dict(objective)) == objective


def test_settings_of_other_objectives_are_an_error():
    with pytest.raises(ValueError, match=naming("MaskedLevel", "'left_out'", "'replaced'")):
        objective_from_dict({"kind": "MaskedLevel", "left_out": 0.3})


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (MaskedLevel, {"mask_ratio": (0.1, 0.2)}),
        (MaskedLevel, {"replaced": 0.0}),
        (MaskedExpression, {"mask_ratio": (1.0,)}),
        (MaskedExpression, {"hidden": 0.8, "swapped": 0.3}),
    ],
)
def test_invalid_settings_are_an_error_that_names_them_and_their_values(kind, wrong):
    with pytest.raises(ValueError, match=naming(*wrong, *wrong.values())):
        kind(**wrong)
