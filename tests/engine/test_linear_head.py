"""The head on frozen hidden states, compared with scikit-learn's logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from scllm.engine.linear_head import PENALTIES, chosen_penalty, fit_linear_head


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    states = rng.normal(3, [1, 10, 0.1, 1, 1], (120, 5))
    states[:, 4] = 7.0  # a constant column
    codes = (states[:, 0] - 3 + rng.normal(0, 0.5, 120) > 0.5).astype(np.int64)
    return states, codes, np.where(codes == 1, 2.0, 0.7)


def applied(head, states) -> np.ndarray:
    with torch.no_grad():
        return head.double()(torch.from_numpy(states)).numpy()


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_one_versus_rest_equals_logistic_regression(rows, penalty):
    states, codes, weights = rows
    head = fit_linear_head(states, codes, 2, loss={"bce": 1.0}, weights=weights, penalty=penalty)
    scaled = (states - states.mean(0)) / np.maximum(states.std(0), 1e-9)
    # scikit-learn sums the loss over rows and adds the penalty once
    reference = LogisticRegression(C=1 / (penalty * weights.sum()), tol=1e-8).fit(scaled, codes, sample_weight=weights)
    expected = reference.decision_function(scaled)
    np.testing.assert_allclose(applied(head, states), np.column_stack([-expected, expected]), atol=5e-3)


@pytest.mark.parametrize("loss", ["ce", "bce", "dice", "focal"])
def test_each_loss_learns_three_classes(loss):
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(3), 40)
    states = rng.normal(0, 0.5, (120, 4)) + np.eye(3, 4)[codes] * 3
    head = fit_linear_head(states, codes, 3, loss={loss: 1.0}, weights=np.ones(120), penalty=0.01)
    assert (applied(head, states).argmax(1) == codes).mean() > 0.95


def test_noise_gets_a_strong_penalty_and_signal_a_weak_one(rows):
    states, codes, weights = rows
    noise = np.random.default_rng(1).normal(size=(120, 60))
    options = {"loss": {"bce": 1.0}, "weights": weights}
    assert chosen_penalty(noise, codes, 2, **options) == max(PENALTIES)
    assert chosen_penalty(states, codes, 2, **options) < 1.0
    # a class with one row cannot be split into folds
    assert chosen_penalty(states[:3], np.array([0, 0, 1]), 2, loss={"ce": 1.0}, weights=np.ones(3)) == 1.0
