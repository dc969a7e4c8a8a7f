"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: train few weights, then merge them into the model."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypeAlias, Union

import torch
from torch import nn

from scllm._log import quiet_imports
from scllm.models.base import CellModel

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Lora", "LoraSettings", "adapted_layers", "add_adapters", "lora_settings", "merge_adapters"]

Lora: TypeAlias = Union[int, "LoraSettings", "LoraConfig"]


@dataclass(frozen=True)
class LoraSettings:
    """Adapters beside every linear layer of the blocks.

    Parameters
    ----------
    r
        Rank: an adapter of a layer ``(d, f)`` has ``r (d + f)`` weights.
    alpha
        Scale of what adapters add, over ``r``.
    dropout
        Dropout of what goes into the adapters.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, Integral) or self.r < 1:
            raise ValueError(
                f"the rank of lora is {self.r!r}, a whole number of at least 1 expected. 8 is usual; lora=None trains "
                "all weights."
            )
        if not (isinstance(self.alpha, Real) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha of lora is {self.alpha!r}, a number above 0 expected. Twice the rank is usual.")
        if not (isinstance(self.dropout, Real) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout of lora is {self.dropout!r}, a share from 0 up to below 1 expected. 0 is none.")


def lora_settings(lora: Lora | None) -> LoraSettings | None:
    """Settings of the adapters, if there shall be any; an error where they are none, or peft is not installed."""
    if lora is None:
        return None
    if find_spec("peft") is None:
        raise ImportError('lora= needs the package peft, which is not installed. Run: pip install "scllm-tools[peft]"')
    if isinstance(lora, LoraSettings):
        return lora
    if isinstance(lora, Integral) and not isinstance(lora, bool):
        return LoraSettings(r=int(lora))
    with quiet_imports():
        from peft import LoraConfig

    if not isinstance(lora, LoraConfig):
        raise TypeError(
            f"lora is {lora!r}, the rank of adapters, LoraSettings or peft's LoraConfig expected. 8 is a common rank."
        )
    return _of_peft(lora)


def _of_peft(config: LoraConfig) -> LoraSettings:
    """Rank, scale and dropout of peft's own configuration; an error where it asks for more."""
    with quiet_imports():
        from peft import LoraConfig

    kept = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    asked, usual = config.to_dict(), LoraConfig(task_type=config.task_type, **kept).to_dict()
    more = next((name for name in asked if asked[name] != usual[name]), None)
    if more is not None:
        raise ValueError(
            f"lora has {more}={asked[more]!r}, {', '.join(kept)} alone expected: adapters go beside all linear layers "
            "of the blocks that are not frozen. Leave it out."
        )
    return LoraSettings(r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout)


def adapted_layers(model: CellModel, frozen: Collection[str]) -> list[str]:
    """Names of the layers that adapters go beside: the linear ones of the blocks whose weights are not frozen."""
    within = {id(module) for block in model.blocks for module in block.modules()}
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in within and f"{name}.weight" not in frozen
    ]
    if not names:
        raise ValueError("lora= adapts linear layers of the blocks, and all of them are frozen. Freeze fewer blocks.")
    return names


def add_adapters(model: CellModel, settings: LoraSettings, *, random_state: int = 0) -> None:
    """Put adapters beside the blocks' linear layers that are not frozen, in place; only they and the heads are trained.

    Where adapters start is a function of ``random_state``.
    """
    with quiet_imports():
        from peft import LoraConfig, inject_adapter_in_model

    names = adapted_layers(model, {name for name, weight in model.named_parameters() if not weight.requires_grad})
    heads = [weight for name, weight in model.named_parameters() if name.startswith("heads.") and weight.requires_grad]
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names, bias="none"
    )
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(random_state)  # of the CPU alone: GPUs keep their state
        inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name)
    for weight in heads:
        weight.requires_grad_(True)


def merge_adapters(model: CellModel) -> None:
    """Add what adapters learnt to the weights beside them, and take the adapters out, in place."""
    with quiet_imports():
        from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    for weight in model.parameters():
        weight.requires_grad_(True)
