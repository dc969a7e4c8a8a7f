"""An end-to-end case with a known optimum: eight programmes drive expression, and four of them can be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from scllm import metrics, models
from scllm.models import Plausibility, ValueEncoder

N_GENES, N_PROGRAMMES, N_VISIBLE, NOISE = 24, 8, 4, 0.5
LOADINGS = np.zeros((N_PROGRAMMES, N_GENES))
LOADINGS[np.arange(N_GENES) % N_PROGRAMMES, np.arange(N_GENES)] = np.random.default_rng(0).uniform(0.8, 1.2, N_GENES)
# the variance of hidden programmes and of the noise is all that is left
OPTIMUM = float((LOADINGS[N_VISIBLE:] ** 2).sum() / N_GENES + NOISE**2)


def spots(n, seed):
    """Features (the visible programmes among others) and expression."""
    rng = np.random.default_rng(seed)
    programmes = rng.normal(size=(n, N_PROGRAMMES))
    expression = 3 + programmes @ LOADINGS + NOISE * rng.normal(size=(n, N_GENES))
    features = np.hstack([programmes[:, :N_VISIBLE], rng.normal(size=(n, 12))])
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(expression.astype(np.float32))


@pytest.fixture(scope="module")
def lm():
    """An scgpt that predicts hidden values, trained on other spots."""
    torch.manual_seed(0)
    genes = [f"g{i}" for i in range(N_GENES)]
    sizes = {"n_layers": 1, "n_heads": 4, "d_model": 32, "d_hidden": 64, "dropout": 0.0, "cell_decoder": None}
    model = models.build("scgpt", vocab=genes, encoder=ValueEncoder(max_len=N_GENES + 1), **sizes)
    term = Plausibility(model, kind="masked").train()
    term.lm = model
    n_steps = 600
    expression = spots(32 * n_steps, 3)[1]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=n_steps, pct_start=0.05)
    for batch in expression.split(32):
        loss = term(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def fitted(term=None, weight=0.0, n_steps=300):
    """Scores on new spots."""
    features, truth = spots(1500, 1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, N_GENES))
    nn.init.constant_(network[2].bias, 3.0)
    optimizer, factor = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01), 0.0
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / n_steps)
        rows = torch.arange(step * 32, step * 32 + 32) % len(features)
        predicted = network(features[rows])
        loss = main = ((predicted - truth[rows]) ** 2).mean()
        if term is not None:
            extra = term(predicted, truth[rows]).mean()
            if step % 50 == 0:
                norms = [torch.autograd.grad(one, predicted, retain_graph=True)[0].norm() for one in (main, extra)]
                factor = weight * float(norms[0] / norms[1])
            loss = main + factor * extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, truth = (part.numpy() for part in spots(800, 2))
    with torch.no_grad():
        predicted = network(torch.from_numpy(features)).numpy()
    visible = np.arange(N_GENES) % N_PROGRAMMES < N_VISIBLE
    return {
        "error": float(((predicted - truth) ** 2).mean()) / OPTIMUM,
        "pcc": float(metrics.pearson(truth, predicted)[visible].mean()),
        "correlation_error": metrics.correlation_error(truth, predicted),
        "variance_ratio": float(np.median(metrics.variance_ratio(truth, predicted)[visible])),
    }


@pytest.fixture(scope="module")
def plain():
    return fitted()


def test_without_a_term_the_optimum_is_reached(plain):
    assert 0.97 < plain["error"] < 1.05
    assert plain["variance_ratio"] > 0.6


@torch.no_grad()
def test_the_language_model_knows_which_genes_vary_together(lm):
    expression = spots(800, 4)[1]
    error = Plausibility(lm, kind="masked").eval()(expression).mean().item()
    of_the_mean = ((expression - expression.mean(0)) ** 2).mean().item()
    # the best possible is 0.37 of it
    assert error < 0.6 * of_the_mean


def test_feature_lowers_the_correlation_error_at_the_same_correlation(lm, plain):
    found = fitted(Plausibility(lm, kind="feature").train(), 1.0)
    # by 3.5 %; the goal of 10 % is not reached with weights from 0.1 to 10
    assert found["correlation_error"] < 0.985 * plain["correlation_error"]
    assert found["pcc"] > plain["pcc"] - 0.005


def test_strong_nll_collapses_to_the_typical_profile_and_feature_does_not(lm):
    plain = fitted(n_steps=120)
    collapsed = fitted(Plausibility(lm, kind="nll").train(), 5.0, n_steps=120)
    kept = fitted(Plausibility(lm, kind="feature").train(), 0.3, n_steps=120)
    assert collapsed["variance_ratio"] < 0.2 * plain["variance_ratio"]
    assert kept["variance_ratio"] > 0.8 * plain["variance_ratio"]
    assert kept["pcc"] > plain["pcc"] - 0.005
