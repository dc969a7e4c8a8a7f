"""Small models of every family, and cells as each of them reads them."""

from __future__ import annotations

import numpy as np
import torch

from scllm import models, tl
from scllm.models.base import HeadSpec

FAMILIES = ("scgpt", "geneformer", "scbert", "scfoundation", "gpt2", "albert", "xlnet")


def built(family, genes, seed=0, **config):
    """A tiny model in evaluation mode, with a head of two classes."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = models.build(family, vocab=list(genes), **{"size": "tiny", **config})
        model.set_heads([HeadSpec("cell_type", ("A", "B"))])
        # biases start at zero, and norms at one: other values show where one is lost
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "norm" not in name.lower() and "ln_" not in name:
                torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def embedding(adata, model, **options):
    return tl.embed(adata, model, copy=True, **options).obsm["X_scllm"]


def cosines(a, b):
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
