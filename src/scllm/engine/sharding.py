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

__all__ = ["full_norm", "is_sharded", "load_state_in_shards", "shard", "state_in_shards", "weights"]

_MODEL, _OPTIMIZER = "model.", "optimizer."


def shard(model: CellModel, precision: str = "fp32") -> None:
    """Shard the weights of every block and of the rest of the model over the ranks, in place.

    In bf16 on GPUs, the weights of blocks are gathered in bf16, which halves the communication; gradients are summed in
    fp32. Embeddings stay in fp32, and with them the residual stream.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(model.device.type, (ranks.world(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bf16" and model.device.type == "cuda":  # on a CPU, autocast takes no norms with bf16 weights
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
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


def state_in_shards(model: CellModel, optimise: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return this rank's part of the weights and of the optimiser's state, by name."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state = get_optimizer_state_dict(model, optimise, options=_flat())
    return {
        **{_MODEL + name: tensor for name, tensor in get_model_state_dict(model).items()},
        # learning rates and the like are settings
        **{_OPTIMIZER + name: value for name, value in state.items() if isinstance(value, Tensor)},
    }


def load_state_in_shards(model: CellModel, optimise: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what :func:`state_in_shards` returned."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    weights = {name.removeprefix(_MODEL): tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    set_model_state_dict(model, weights)
    state = get_optimizer_state_dict(model, optimise, options=_flat())
    known = {name.removeprefix(_OPTIMIZER): value for name, value in tensors.items() if name.startswith(_OPTIMIZER)}
    set_optimizer_state_dict(model, optimise, {**state, **known}, options=_flat())


def _flat() -> Any:
    """Let every tensor of the optimiser's state have a name of its own."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=True)


def full_norm(trained: list[Tensor], clip: float | None) -> Tensor:
    """Clip gradients and return their norm before clipping, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(trained, clip or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
