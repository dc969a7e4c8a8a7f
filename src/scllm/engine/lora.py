"""Low-rank adapters (LoRA, Hu et al. 2021) with peft: train few weights, then merge them into the model."""

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
    """Settings of the adapters that are added to every linear layer of the blocks.

    Parameters
    ----------
    r
        Rank; an adapter of a layer ``(d, f)`` has ``r (d + f)`` weights.
    alpha
        Scale; the output of an adapter is multiplied by ``alpha / r``.
    dropout
        Dropout on the input of the adapters.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, Integral) or self.r < 1:
            raise ValueError(
                f"Expected the rank of lora to be a whole number of at least 1, got {self.r!r}. 8 is a common rank; "
                "lora=None trains all weights."
            )
        if not (isinstance(self.alpha, Real) and 0 < self.alpha < math.inf):
            raise ValueError(
                f"Expected alpha of lora to be a number above 0, got {self.alpha!r}. Twice the rank is common."
            )
        if not (isinstance(self.dropout, Real) and 0 <= self.dropout < 1):
            raise ValueError(
                f"Expected dropout of lora to be at least 0 and below 1, got {self.dropout!r}. Pass 0 for no dropout."
            )


def lora_settings(lora: Lora | None) -> LoraSettings | None:
    """Return the settings of the adapters (``None`` for no adapters); raise if they are invalid or peft is missing."""
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
            f"Expected lora to be a rank (whole number), LoraSettings or peft's LoraConfig, got {lora!r}. "
            "A common rank is lora=8."
        )
    return _of_peft(lora)


def _of_peft(config: LoraConfig) -> LoraSettings:
    """Read rank, scale and dropout from peft's configuration; raise an error if it sets anything else."""
    with quiet_imports():
        from peft import LoraConfig

    kept = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    asked, usual = config.to_dict(), LoraConfig(task_type=config.task_type, **kept).to_dict()
    more = next((name for name in asked if asked[name] != usual[name]), None)
    if more is not None:
        raise ValueError(
            f"Expected lora to set only {', '.join(kept)}, got {more}={asked[more]!r}. Leave {more} out: adapters are "
            "always added to all linear layers of the blocks that are not frozen."
        )
    return LoraSettings(r=config.r, alpha=config.lora_alpha, dropout=config.lora_dropout)


def adapted_layers(model: CellModel, frozen: Collection[str]) -> list[str]:
    """Return the names of the layers that get adapters: the linear layers of the blocks that are not frozen."""
    within = {id(module) for block in model.blocks for module in block.modules()}
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in within and f"{name}.weight" not in frozen
    ]
    if not names:
        raise ValueError("lora= adapts linear layers of the blocks, but all of them are frozen. Freeze fewer blocks.")
    return names


def add_adapters(model: CellModel, settings: LoraSettings, *, random_state: int = 0) -> None:
    """Add adapters to all linear layers of the blocks that are not frozen, in place; only they and heads are trained.

    ``random_state`` is the seed for the initial weights of the adapters.
    """
    with quiet_imports():
        from peft import LoraConfig, inject_adapter_in_model

    names = adapted_layers(model, {name for name, weight in model.named_parameters() if not weight.requires_grad})
    heads = [weight for name, weight in model.named_parameters() if name.startswith("heads.") and weight.requires_grad]
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names, bias="none"
    )
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(random_state)  # only the CPU's generator; those of GPUs keep their state
        inject_adapter_in_model(config, model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name)
    for weight in heads:
        weight.requires_grad_(True)


def merge_adapters(model: CellModel) -> None:
    """Merge the adapters into the weights of their layers and remove them, in place."""
    with quiet_imports():
        from peft.tuners.lora import LoraLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    for weight in model.parameters():
        weight.requires_grad_(True)
