"""Parameter groups, freezing, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from numbers import Integral
from typing import Any

import torch
from torch import nn

from scllm.engine.config import TrainConfig
from scllm.models.base import CellModel

__all__ = [
    "Freeze", "check_freeze", "freeze", "frozen_weights", "learning_rate", "optimizer", "train_mode", "without_dropout"
]  # fmt: skip

Freeze = int | str | Sequence[str]


def check_freeze(model: CellModel, what: Freeze) -> Freeze:
    """``what`` as a run directory holds it; an error where it names no part of the model, or all of it."""
    if isinstance(what, Integral) and not isinstance(what, bool):
        what = int(what)
    if isinstance(what, bool) or not (isinstance(what, (int, str)) or _is_list_of_names(what)):
        raise TypeError(
            f"freeze is {what!r}, a number of blocks, 'encoder', or a pattern of weight names or a list of such "
            "expected. Leave it out to freeze nothing."
        )
    if isinstance(what, int):
        n_blocks = len(list(model.blocks))
        if not 0 <= what <= n_blocks:
            raise ValueError(f"freeze is {what}, 0 to {n_blocks} blocks expected. The model has {n_blocks} blocks.")
    elif what != "encoder":
        names = [name for name, _ in model.named_parameters()]
        for pattern in _patterns(what):
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(
                    f"freeze: no weight is called {pattern!r}; 'encoder' or names such as {names[:3]} expected. "
                    "Use patterns like 'layers.0.*'."
                )
        if len(frozen_weights(model, what)) == len(names):
            raise ValueError(f"freeze is {what!r}, which is every weight, at least one to train expected. Freeze less.")
    return what


def freeze(model: CellModel, what: Freeze) -> None:
    """Keep weights as they are: the first n blocks, ``"encoder"`` (all but the heads), or name patterns."""
    what = check_freeze(model, what)
    frozen = frozen_weights(model, what)
    for name, weight in model.named_parameters():
        if name in frozen:
            weight.requires_grad_(False)


def frozen_weights(model: CellModel, what: Freeze) -> set[str]:
    """Names of the weights that stay as they are."""
    weights = dict(model.named_parameters())
    if isinstance(what, int):
        within = {id(weight) for block in list(model.blocks)[:what] for weight in block.parameters()}
        return {name for name, weight in weights.items() if id(weight) in within}
    if what == "encoder":
        return {name for name in weights if not name.startswith("heads.")}
    return {name for name in weights if any(fnmatch(name, pattern) for pattern in _patterns(what))}


def _patterns(what: str | Sequence[str]) -> Sequence[str]:
    return [what] if isinstance(what, str) else what


def _is_list_of_names(what: object) -> bool:
    return isinstance(what, (list, tuple)) and len(what) > 0 and all(isinstance(one, str) for one in what)


def train_mode(model: nn.Module) -> None:
    """Training mode, but for modules whose weights are all frozen: they leave dropout off."""
    model.train()
    trained = any(weight.requires_grad for weight in model.parameters())
    if not trained:
        model.eval()
        return
    below_heads = False
    for name, child in model.named_children():
        weights = list(child.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            child.eval()
        elif weights:
            below_heads |= name != "heads"
            if not isinstance(child, nn.Sequential):
                train_mode(child)
    if not below_heads:
        # dropout between frozen parts
        for child in model.children():
            if not list(child.parameters()):
                child.eval()


def without_dropout(model: nn.Module) -> None:
    """Set every probability of dropout to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # attention of transformers drops out by a number of its own
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def optimizer(model: CellModel, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors and tables of embeddings do not; earlier blocks may learn more slowly."""
    assert config.lr is not None
    block_of = {id(weight): i for i, block in enumerate(model.blocks) for weight in block.parameters()}
    n_blocks = len(list(model.blocks))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    above = -1
    for name, weight in model.named_parameters():
        # what a model defines before its blocks stands below the first, what it defines after them above the last
        above = n_blocks if id(weight) in block_of else above
        depth = n_blocks if name.startswith("heads.") else block_of.get(id(weight), above)
        if not weight.requires_grad:
            continue
        scale = config.layer_decay ** (n_blocks - depth)
        decay = config.weight_decay if weight.ndim > 1 and id(weight) not in tables else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(weight)
    if not groups:
        raise ValueError("every weight is frozen, at least one to train expected. Freeze less, or add a head.")
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, fused=True)


def learning_rate(step: int, epoch: int, n_steps: int, config: TrainConfig) -> float:
    """Learning rate of a step (counted from 0)."""
    assert config.lr is not None
    warmup = config.warmup or 0
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    after = min(1.0, max(0, step - warmup) / max(1, n_steps - warmup))
    match config.schedule:
        case "step" | None:
            fall = config.gamma**epoch
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * after))
        case "linear":
            fall = 1 - after
        case "constant":
            fall = 1.0
    return config.lr * rise * fall
