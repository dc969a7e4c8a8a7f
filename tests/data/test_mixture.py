"""Mixture weights: the probability of each cell, and what is not allowed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm.data.mixture import cell_weights, check_group_weights

GROUPS = pd.Series(["lung"] * 60 + ["blood"] * 30 + ["skin"] * 10)


def shares(group_weights, groups=GROUPS):
    """The probability of each group."""
    weights = cell_weights(check_group_weights(group_weights), groups, groups)
    assert weights.dtype == np.float32
    return pd.Series(weights / weights.sum()).groupby(groups).sum()


@pytest.mark.parametrize("temperature", [0, 0.5, 1])
def test_the_probability_of_a_group_is_a_power_of_its_number_of_cells(temperature):
    powers = {name: n**temperature for name, n in (("lung", 60), ("blood", 30), ("skin", 10))}
    found = shares({"key": "tissue", "temperature": temperature})
    for name, power in powers.items():
        assert found[name] == pytest.approx(power / sum(powers.values()), rel=1e-5)


def test_with_temperature_1_all_cells_are_equally_likely_and_with_0_all_groups_are():
    assert np.ptp(cell_weights({"key": "tissue", "temperature": 1.0}, GROUPS, GROUPS)) == 0
    np.testing.assert_allclose(shares({"key": "tissue", "temperature": 0}), 1 / 3, rtol=1e-5)


def test_given_weights_are_those_of_groups_and_not_of_cells():
    found = shares({"key": "tissue", "weights": {"blood": 2, "lung": 1, "skin": 0}})
    np.testing.assert_allclose(found[["blood", "lung", "skin"]], [2 / 3, 1 / 3, 0], rtol=1e-5)


def test_groups_without_training_cells_may_be_named():
    weights = {"key": "tissue", "weights": {"blood": 2, "lung": 1, "skin": 5}}
    training = GROUPS[GROUPS != "skin"]
    found = cell_weights(check_group_weights(weights), GROUPS, training)
    assert found[training == "blood"].sum() == pytest.approx(2 * found[training == "lung"].sum())


def test_groups_that_are_numbers_are_named_as_text():
    numbers = pd.Series([1, 1, 1, 2])
    found = cell_weights(check_group_weights({"key": "part", "weights": {1: 1, "2": 3}}), numbers, numbers)
    np.testing.assert_allclose(found / found.sum(), [1 / 12, 1 / 12, 1 / 12, 3 / 4], rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ("tissue", ValueError, ["'tissue'", "'temperature'", "'weights'"]),
        ({"key": "tissue"}, ValueError, ["'key'", "'temperature'", "'weights'"]),
        ({"key": "tissue", "temperature": 1, "weights": {"a": 1}}, ValueError, ["either"]),
        ({"key": "tissue", "temprature": 1}, ValueError, ["'temprature'"]),
        ({"key": ["tissue"], "temperature": 1}, TypeError, ["['tissue']"]),
        ({"key": "tissue", "temperature": 5}, ValueError, [5, 0, 1]),
        ({"key": "tissue", "temperature": "hot"}, ValueError, ["'hot'"]),
        ({"key": "tissue", "temperature": float("nan")}, ValueError, ["nan"]),
        ({"key": "tissue", "weights": [1, 2]}, TypeError, ["[1, 2]"]),
        ({"key": "tissue", "weights": {}}, TypeError, ["{}"]),
        ({"key": "tissue", "weights": {"blood": -1}}, ValueError, ["'blood'", "-1", 0]),
        ({"key": "tissue", "weights": {"blood": "2"}}, ValueError, ["'blood'", "'2'"]),
        ({"key": "tissue", "weights": {"blood": float("inf")}}, ValueError, ["'blood'", "inf"]),
    ],
)
def test_other_values_are_an_error_that_names_them(given, error, named):
    with pytest.raises(error, match=naming("group_weights", *named)):
        check_group_weights(given)


@pytest.mark.parametrize(
    ("weights", "error", "named"),
    [
        ({"blod": 1, "lung": 1, "skin": 1}, KeyError, ["'blod'", "'blood'", "obs['tissue']"]),
        ({"blood": 1}, ValueError, ["obs['tissue']", "'lung', 'skin'"]),
        ({"blood": 0, "lung": 0, "skin": 0}, ValueError, ["obs['tissue']", 3]),
    ],
)
def test_weights_that_do_not_fit_the_groups_are_an_error_that_names_them(weights, error, named):
    with pytest.raises(error, match=naming("group_weights", *named)):
        cell_weights(check_group_weights({"key": "tissue", "weights": weights}), GROUPS, GROUPS)
