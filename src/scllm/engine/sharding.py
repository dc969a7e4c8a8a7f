"""Sharding of weights, gradients and optimiser state over ranks (``strategy="fsdp"``), gathered for checkpoints.

For models that do not fit on one device (Zhao et al. 2023, doi:10.14778/3611540.3611569). torch's modules for this take
more than a second to import, so they are imported where they are used.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scllm.engine import ranks
from scllm.models.base import CellModel
from scllm.models.entries import entries

__all__ = ["full_norm", "is_sharded", "load_optimizer", "load_weights", "optimizer_state", "shard", "weights"]


def shard(model: CellModel) -> None:
    """Shard the weights of every block and of the rest of the model over the ranks, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (ranks.world(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        _gather_in_entries(block)
    fully_shard(model, mesh=mesh)
    _gather_in_entries(model)
    # the warning is about in-place changes of a method's result, which scllm does not make
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)


def _gather_in_entries(module: nn.Module) -> None:
    """Make the methods that are called instead of ``forward`` gather the weights they need."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    for name in entries(module):
        register_fsdp_forward_method(module, name)


def is_sharded(model: CellModel) -> bool:
    """Return whether every rank holds only a part of each weight."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def weights(model: CellModel) -> dict[str, Tensor]:
    """Return the complete weights on the CPU; every rank must call this."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def load_weights(model: CellModel, state: Mapping[str, Any]) -> None:
    """Load complete weights."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def optimizer_state(model: CellModel, optimise: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the complete state of the optimiser; every rank must call this."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(model, optimise, options=options)
    return optimise.state_dict()


def load_optimizer(model: CellModel, optimise: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the complete state of the optimiser."""
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        set_optimizer_state_dict(model, optimise, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimise.load_state_dict(state)


def full_norm(trained: list[Tensor], clip: float | None) -> Tensor:
    """Clip gradients and return their norm before clipping, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
