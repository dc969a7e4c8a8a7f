"""Losses, compared with computations in float64 and with scikit-learn if it has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from scllm.engine import losses

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def logits():
    return torch.from_numpy(np.random.default_rng(0).normal(0, 2, (12, 4))).requires_grad_()


LABEL = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 2, 2, 3, 1])
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0])


def gradient(value, of):
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def assert_same(value, expected, of):
    """Compare values and gradients with those computed in float64."""
    torch.testing.assert_close(value.double(), expected, **CLOSE)
    torch.testing.assert_close(gradient(value.sum(), of), gradient(expected.sum(), of), **CLOSE)


def test_squared_error_sums_squared_differences():
    predicted = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    value = losses.squared_error(predicted, torch.tensor([0.0, 2.0, 1.0]))
    assert value.item() == 10
    assert gradient(value, predicted).tolist() == [2, 0, 6]


def test_relative_error_divides_by_the_target():
    value = losses.relative_error(torch.tensor([1.0, 6.0]), torch.tensor([2.0, 4.0]))
    assert value.item() == pytest.approx(1 / 2 + 2 / 4, rel=1e-5)


def test_zero_likelihood_is_the_log_loss_of_being_expressed(logits):
    target = torch.tensor([0.0, 3.0, 1.0, 0.0])
    predicted = logits[0].detach()
    expected = log_loss(target > 0, torch.sigmoid(predicted).numpy(), normalize=False)
    assert losses.zero_likelihood(predicted, target).item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_the_log_loss(logits):
    expected = log_loss(LABEL, logits.detach().softmax(1).numpy())
    assert losses.cross_entropy(logits, LABEL).mean().item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_weighted_by_class(logits):
    p = logits.softmax(1)
    expected = torch.stack([-WEIGHT[k] * p[i, k].log() for i, k in enumerate(LABEL)])
    assert_same(losses.cross_entropy(logits, LABEL, WEIGHT), expected, logits)


def test_binary_cross_entropy_is_one_log_loss_per_class(logits):
    p = logits.sigmoid()
    expected = torch.stack(
        [sum(-(p[i, c] if c == k else 1 - p[i, c]).log() for c in range(4)) for i, k in enumerate(LABEL)]
    )
    assert_same(losses.binary_cross_entropy(logits, LABEL), expected, logits)
    assert_same(losses.binary_cross_entropy(logits, LABEL, WEIGHT), expected * WEIGHT[LABEL], logits)
    by_sklearn = sum(log_loss(LABEL == c, p[:, c].detach().numpy()) for c in range(4))
    assert losses.binary_cross_entropy(logits, LABEL).mean().item() == pytest.approx(by_sklearn, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_gives_easy_cells_less_weight(logits, gamma):
    p = logits.softmax(1)
    expected = torch.stack([-((1 - p[i, k]) ** gamma) * p[i, k].log() for i, k in enumerate(LABEL)])
    assert_same(losses.focal(logits, LABEL, gamma=gamma), expected, logits)


def test_focal_without_gamma_is_cross_entropy(logits):
    torch.testing.assert_close(losses.focal(logits, LABEL, gamma=0.0), losses.cross_entropy(logits, LABEL))


def test_dice_is_one_minus_the_mean_overlap(logits):
    p = logits.softmax(1)
    overlaps = [
        (2 * sum(p[i, c] for i, k in enumerate(LABEL) if k == c) + 1)
        / (sum(p[i, c] for i in range(12)) + sum(k == c for k in LABEL) + 1)
        for c in range(4)
    ]
    assert_same(losses.dice(logits, LABEL), 1 - sum(overlaps) / 4, logits)


def test_dice_is_weighted_by_class(logits):
    p = logits.softmax(1)
    target = torch.eye(4, dtype=p.dtype)[LABEL]
    overlap = (2 * (p * target).sum(0) + 1) / (p.sum(0) + target.sum(0) + 1)
    assert_same(losses.dice(logits, LABEL, WEIGHT), 1 - (overlap * WEIGHT).sum() / WEIGHT.sum(), logits)


@pytest.mark.parametrize("weight", [None, WEIGHT.double()], ids=["alike", "weighted"])
@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.binary_cross_entropy, losses.focal, losses.dice])
def test_gradients_equal_finite_differences(logits, loss, weight):
    assert torch.autograd.gradcheck(lambda x: loss(x, LABEL, weight), logits)


def test_gradients_of_smoothed_targets_equal_finite_differences(logits):
    assert torch.autograd.gradcheck(lambda x: losses.cross_entropy(x, LABEL, WEIGHT.double(), 0.1), logits)


def test_dice_ignores_classes_without_cells_in_the_batch(logits):
    two = LABEL[LABEL < 2]
    wide = torch.cat([logits[LABEL < 2][:, :2], torch.full((len(two), 1), -1e4)], dim=1)
    torch.testing.assert_close(losses.dice(wide, two), losses.dice(wide[:, :2], two))


def test_dice_of_a_perfect_prediction_is_zero():
    assert losses.dice(torch.eye(4)[LABEL] * 100, LABEL).item() == pytest.approx(0, abs=1e-6)


def test_elastic_similarity_is_a_mean_over_all_pairs(logits):
    def cosine(i, j):
        return logits[i] @ logits[j] / (logits[i].norm() * logits[j].norm())

    pairs = [0 if i == j else max(0, cosine(i, j)) for i in range(12) for j in range(12)]
    expected = sum(1 - (c - 0.6) ** 2 for c in pairs) / 144
    assert_same(losses.elastic_similarity(logits, 0.6), expected, logits)


def test_contrastive_finds_each_cell_among_all(logits):
    other = logits.detach().flip(1)
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (logits, other))
    expected = (
        sum(-(a[i] @ b[i] / 0.5) + sum((a[i] @ b[j] / 0.5).exp() for j in range(12)).log() for i in range(12)) / 12
    )
    assert_same(losses.contrastive(logits, other), expected, logits)
    assert losses.contrastive(torch.eye(3) * 9, torch.eye(3), 0.01).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.binary_cross_entropy, losses.focal, losses.dice])
def test_extreme_logits_give_finite_losses_and_gradients(loss):
    logits = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], requires_grad=True)
    value = loss(logits, torch.tensor([1, 1])).sum()
    assert value.isfinite()
    assert gradient(value, logits).isfinite().all()
