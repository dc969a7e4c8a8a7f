"""Parameter groups, frozen weights and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from numbers import Integral
from typing import Any

import torch
from torch import nn

from scllm.engine.config import Settings
from scllm.models.base import CellModel

__all__ = [
    "Freeze",
    "check_freeze",
    "freeze",
    "frozen_weights",
    "learning_rate",
    "optimizer",
    "train_mode",
    "without_dropout",
]

Freeze = int | str | Sequence[str]


def check_freeze(model: CellModel, what: Freeze) -> Freeze:
    """Check ``freeze=`` and return it as plain data; raise if it matches no weight of the model, or all of them."""
    if isinstance(what, Integral) and not isinstance(what, bool):
        what = int(what)
    if isinstance(what, bool) or not (isinstance(what, (int, str)) or _is_list_of_names(what)):
        raise TypeError(
            "Expected freeze to be a number of blocks, 'encoder', a pattern of weight names or a list of patterns, "
            f"got {what!r}. Leave it out to freeze nothing."
        )
    if isinstance(what, int):
        n_blocks = len(list(model.blocks))
        if not 0 <= what <= n_blocks:
            raise ValueError(
                f"Expected freeze from 0 to {n_blocks}, the number of blocks in the model, got {what}. Freeze fewer "
                "blocks."
            )
    elif what != "encoder":
        names = [name for name, _ in model.named_parameters()]
        for pattern in _patterns(what):
            if not any(fnmatch(name, pattern) for name in names):
                raise ValueError(
                    f"Expected freeze to be 'encoder' or to match names of weights such as {names[:3]}, but "
                    f"{pattern!r} matches none. Pass a pattern such as 'layers.0.*'."
                )
        if len(frozen_weights(model, what)) == len(names):
            raise ValueError(
                f"Expected freeze to leave at least one weight to train, got {what!r}, which matches all {len(names)} "
                "weights. Freeze less."
            )
    return what


def freeze(model: CellModel, what: Freeze) -> None:
    """Freeze weights: the first n blocks, ``"encoder"`` (all but the heads), or weights that match name patterns."""
    what = check_freeze(model, what)
    frozen = frozen_weights(model, what)
    for name, weight in model.named_parameters():
        if name in frozen:
            weight.requires_grad_(False)


def frozen_weights(model: CellModel, what: Freeze) -> set[str]:
    """Return the names of the frozen weights."""
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
    """Switch to training mode, except for modules whose weights are all frozen: their dropout stays off."""
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
        # also no dropout between frozen modules
        for child in model.children():
            if not list(child.parameters()):
                child.eval()


def without_dropout(model: nn.Module) -> None:
    """Set all dropout probabilities to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # attention layers of transformers store their dropout probability as a plain number
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def optimizer(model: CellModel, config: Settings) -> torch.optim.Optimizer:
    """Make an AdamW optimiser with layer-wise learning rates; vectors and embedding tables have no weight decay."""
    block_of = {id(weight): i for i, block in enumerate(model.blocks) for weight in block.parameters()}
    n_blocks = len(list(model.blocks))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    above = -1
    for name, weight in model.named_parameters():
        # modules defined before the blocks count as below the first block, modules after them as above the last
        above = n_blocks if id(weight) in block_of else above
        depth = n_blocks if name.startswith("heads.") else block_of.get(id(weight), above)
        if not weight.requires_grad:
            continue
        scale = config.layer_decay ** (n_blocks - depth)
        decay = config.weight_decay if weight.ndim > 1 and id(weight) not in tables else 0.0
        group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(weight)
    if not groups:
        raise ValueError("Expected at least one weight to train, but all are frozen. Freeze less, or add a head.")
    return torch.optim.AdamW(list(groups.values()), lr=config.lr, fused=True)


def learning_rate(step: int, epoch: int, n_steps: int, config: Settings) -> float:
    """Compute the learning rate of a training step (counted from 0)."""
    warmup = config.warmup
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    after = min(1.0, max(0, step - warmup) / max(1, n_steps - warmup))
    match config.schedule:
        case "step":
            fall = config.gamma**epoch
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * after))
        case "linear":
            fall = 1 - after
        case "constant":
            fall = 1.0
    return config.lr * rise * fall
