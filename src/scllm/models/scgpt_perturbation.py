"""Prediction of a perturbed cell from a cell before it, by an affine function of each value (scGPT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scllm.models.base import Batch
from scllm.models.layers import mlp
from scllm.models.scgpt_config import Config

if TYPE_CHECKING:
    from scllm.models.scgpt import Model

__all__ = ["perturbation_parts", "predict_perturbed"]

# values of the flag of a gene in the original: not perturbed, perturbed, padding
_N_FLAGS = 3


def perturbation_parts(config: Config) -> dict[str, nn.Module]:
    """Make the flags of genes, and an ensemble of decoders (``TransformerGenerator`` in the original)."""
    d = config.d_model
    parts: dict[str, nn.Module] = {}
    if config.perturbed:
        parts["flag_embedding"] = nn.Embedding(_N_FLAGS, d)
        parts["coefficients"] = nn.ModuleList(mlp(d, d) for _ in range(config.n_decoders))
        parts["offsets"] = nn.ModuleList(mlp(d, d) for _ in range(config.n_decoders))
    if config.n_covariates:
        parts["covariate_embedding"] = nn.Sequential(nn.Linear(config.n_covariates, d), nn.LayerNorm(d))
    return parts


def predict_perturbed(model: Model, batch: Batch, flags: Tensor, covariate: Tensor | None) -> Tensor:
    """Predict the value of each token with each decoder, ``(n_decoders, t)``."""
    assert batch.values is not None
    x = model.inputs(batch) + model.flag_embedding(flags)
    if covariate is not None:
        treated = covariate.isfinite().all(1, keepdim=True)
        x = x + (model.covariate_embedding(covariate.nan_to_num()) * treated)[batch.cell]
    for block in model.blocks:
        x = block(x, batch)
    value = batch.values.to(x.dtype)
    decoders = zip(model.coefficients, model.offsets, strict=True)
    return torch.stack([factor(x)[:, 0] * value + offset(x)[:, 0] for factor, offset in decoders])
