"""Gene sentences to train on, and the shortest training there is."""

from __future__ import annotations

import numpy as np
import torch

from scllm import models
from scllm.data.tokens import Tokens
from scllm.engine.likelihood import gene_nats
from scllm.engine.objectives import objective_from_dict
from scllm.models.base import Batch

TINY = {"n_layers": 2, "n_heads": 2, "d_model": 32, "dropout": 0.0, "max_len": 32}


def built(family, n_genes=24, seed=0, **config):
    """A tiny model over genes g0, g1, ..."""
    sizes = {} if "hf_config" in config else TINY
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return models.build(family, vocab=[f"g{i}" for i in range(n_genes)], **{**sizes, "max_len": 32, **config})


def sentences(model, genes):
    """One cell a list of genes, behind ``<cls>``."""
    cells = [[model.vocab.cls_id, *cell] for cell in genes]
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in cells])])
    return Batch.from_tokens(Tokens(indptr, np.concatenate(cells), None), keys=np.arange(len(cells)))


def shuffled(model, n_cells, length, seed):
    """Cells of ``length`` different genes drawn at random from all, in random order."""
    rng = np.random.default_rng(seed)
    n_genes = len(model.vocab.genes)
    return sentences(model, [rng.permutation(n_genes)[:length] for _ in range(n_cells)])


def own_objective(model):
    return objective_from_dict(model.config.objective())


def train(model, draw, *, steps, lr=3e-3, objective=None):
    """Adam on batches ``draw(step)``; the loss of each step."""
    objective = objective or own_objective(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        loss = objective(model, draw(step), step)
        mean = loss.sum / loss.count
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        losses.append(mean.item())
    return losses


@torch.no_grad()
def nats(model, batch):
    """Mean over genes."""
    return gene_nats(model.eval(), batch)[1].mean().item()
