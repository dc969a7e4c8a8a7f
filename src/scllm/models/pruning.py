"""Prune models: set the smallest weights to zero, or remove attention heads and neurons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from scllm.models.base import CellModel

__all__ = [
    "BlockParts",
    "Kept",
    "Units",
    "block_parts",
    "compression",
    "keep",
    "prune_structured",
    "prune_weights",
    "pruned_weights",
    "rows",
    "shrink",
]


@dataclass(frozen=True)
class Units:
    """Location of the weights of a block's heads, or of its feed-forward neurons.

    Parameters
    ----------
    places
        Module, name of the weight, axis of the units, and how often all units are repeated along that axis (three
        times if queries, keys and values are one matrix).
    n
        Number of units.
    """

    places: tuple[tuple[nn.Module, str, int, int], ...]
    n: int

    def norms(self) -> Tensor:
        """Compute the L2 norm of each unit's weights without biases, ``(n,)``."""
        squares = torch.zeros(self.n, dtype=torch.float64)
        for module, name, axis, repeats in self.places:
            weight = getattr(module, name)
            if weight is not None and name != "bias":
                by_unit = weight.detach().double().cpu().movedim(axis, 0).reshape(repeats, self.n, -1)
                squares += by_unit.square().sum((0, 2))
        return squares.sqrt()

    def keep(self, kept: Tensor) -> None:
        """Keep only the given units, in place."""
        for module, name, axis, repeats in self.places:
            weight = getattr(module, name)
            if weight is None:
                continue
            width = weight.shape[axis] // (repeats * self.n)  # entries of one unit
            start = torch.arange(repeats)[:, None] * self.n + kept.cpu()
            index = (start.reshape(-1, 1) * width + torch.arange(width)).reshape(-1)
            left = weight.detach().index_select(axis, index.to(weight.device))
            setattr(module, name, nn.Parameter(left, requires_grad=weight.requires_grad))
            if isinstance(module, nn.Linear) and name == "weight":
                module.out_features, module.in_features = left.shape


@dataclass(frozen=True)
class BlockParts:
    """What pruning removes of a block, which says so itself by a method ``parts``.

    Parameters
    ----------
    heads
        Weights of the heads: queries, keys, values and the output projection.
    neurons
        Weights of the neurons of the feed-forward layer: their inputs and outputs.
    counts
        Attributes that hold the number of heads: module, name, and how much each head adds to it.
    """

    heads: Units
    neurons: Units
    counts: tuple[tuple[Any, str, int], ...]


Kept = tuple[Tensor, Tensor]
"""Heads and neurons that are kept in a block."""


def rows(linear: nn.Module, repeats: int = 1) -> tuple[tuple[nn.Module, str, int, int], ...]:
    """Locate units that are outputs of a linear layer."""
    return (linear, "weight", 0, repeats), (linear, "bias", 0, repeats)


def block_parts(blocks: Sequence[Any]) -> list[BlockParts]:
    """Ask each block for what can be removed of it."""
    for block in blocks:
        if not hasattr(block, "parts"):
            raise ValueError(
                f"Structured pruning expects blocks with a method parts(), but {type(block).__name__!r}, a block of "
                "this model, has none. Define it (see scllm.models.layers.Block), or use structured=False."
            )
    return [block.parts() for block in blocks]


def shrink(parts: BlockParts, kept: Kept) -> None:
    """Remove all heads and neurons of a block except those kept, in place."""
    kept_heads, kept_neurons = kept
    parts.neurons.keep(kept_neurons)
    parts.heads.keep(kept_heads)
    for module, name, each in parts.counts:
        setattr(module, name, each * len(kept_heads))


def keep(blocks: Sequence[BlockParts], amount: float) -> list[Kept]:
    """Which heads and neurons stay in each block when a share ``amount`` of both goes.

    A unit counts as much as the norm of its weights (Li et al., ICLR 2017, arXiv:1608.08710). Heads of all blocks are
    compared, each with the mean of its block, since blocks differ in scale; every block keeps its largest at least.
    Neurons go block by block, so that all blocks stay about as wide; in eights, which is what matrix units read.
    """
    norms = [block.heads.norms() for block in blocks]
    relative = torch.cat([norm / norm.mean().clamp(min=1e-30) for norm in norms])
    largest = torch.cat([torch.arange(len(norm)) == norm.argmax() for norm in norms])
    relative[largest] = torch.inf
    gone = torch.zeros(len(relative), dtype=torch.bool)
    n_gone = min(round(amount * len(relative)), len(relative) - len(blocks))
    gone[relative.argsort(stable=True)[:n_gone]] = True
    parts = gone.split([len(norm) for norm in norms])
    return [((~part).nonzero().flatten(), _kept_neurons(block, amount)) for block, part in zip(blocks, parts)]


def prune_structured(model: CellModel, amount: float) -> None:
    """Take heads and neurons out of all blocks, in place; the configuration says what is left."""
    sizes: dict[str, tuple[int, ...]] = {}
    chosen = {name: (blocks, keep(blocks, amount)) for name, blocks in model.prunable().items()}
    if not any(_loses(block, left) for blocks, kept in chosen.values() for block, left in zip(blocks, kept)):
        raise ValueError(
            f"Expected amount to remove at least one head or neuron, but {amount} removes none. Pass a larger one, "
            "or use structured=False."
        )
    for name, (blocks, kept) in chosen.items():
        for block, left in zip(blocks, kept, strict=True):
            shrink(block, left)
        sizes[f"{name}_heads"] = tuple(len(left) for left, _ in kept)
        sizes[f"{name}_hidden"] = tuple(len(left) for _, left in kept)
    model.config = replace(model.config, **sizes)  # type: ignore[arg-type]
    model.layers_changed()


def prune_weights(model: CellModel, amount: float) -> None:
    """Set the smallest weights of each linear layer to zero, in place and permanently.

    Magnitude pruning (Han et al., NeurIPS 2015, arXiv:1506.02626). The same fraction of every matrix is removed,
    because one threshold for all would empty matrices whose weights are all small.
    """
    with torch.no_grad():
        for weight in _linear_weights(model):
            n = round(amount * weight.numel())
            smallest = weight.abs().flatten().argsort(stable=True)[:n]
            weight.view(-1)[smallest] = 0
    model.config = replace(model.config, zeros_stay=True)


def pruned_weights(model: CellModel) -> list[tuple[Tensor, Tensor]]:
    """Return the trainable pruned matrices, each with a mask that is 0 where weights were pruned and 1 elsewhere."""
    if not model.config.zeros_stay:
        return []
    matrices = [weight for weight in _linear_weights(model) if weight.requires_grad]
    return [(weight, (weight.detach() != 0).to(weight.dtype)) for weight in matrices]


def compression(model: CellModel) -> str:
    """Describe how a model was compressed; empty if it was not."""
    said = [f"{model.weight_dtype} weights"] if model.weight_dtype != "float32" else []
    sized = [field.name for field in fields(model.config) if field.name.endswith("block_heads")]
    for name in sized:
        n_heads, hidden = getattr(model.config, name), getattr(model.config, name.replace("heads", "hidden"))
        if n_heads is not None and hidden is not None:
            what = name.removesuffix("_heads").replace("_", " ")
            said.append(f"pruned to {_range(n_heads)} heads and {_range(hidden)} neurons per {what}")
    # rounding to int8 makes zeros of its own
    zeros = _share_of_zeros(model) if model.weight_dtype == "float32" else 0.0
    return ", ".join([*said, f"pruned: {zeros:.0%} of the linear weights are zero"] if zeros > 0.01 else said)


def _loses(block: BlockParts, kept: Kept) -> bool:
    """Return whether a block loses heads or neurons."""
    return len(kept[0]) < block.heads.n or len(kept[1]) < block.neurons.n


def _kept_neurons(block: BlockParts, amount: float) -> Tensor:
    """Return the neurons with the largest norms, in their order."""
    norms = block.neurons.norms()
    n = len(norms)
    step = 8 if n % 8 == 0 and n >= 64 else 1
    left = max(step, step * round((1 - amount) * n / step))
    return norms.argsort(descending=True, stable=True)[:left].sort().values


def _linear_weights(model: CellModel) -> Iterator[Tensor]:
    """Yield all matrices that tokens are multiplied by, except those of heads, gene tables and adapters."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    others = {id(module): names for module, names in model.matrices()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in tables and not _is_beside(name):
            yield module.weight
        yield from (getattr(module, which) for which in others.get(id(module), ()))


def _is_beside(name: str) -> bool:
    """Return whether a layer is a head, or an adapter, which begins with zeros of its own."""
    return name.startswith("heads.") or ".lora_" in name


def _share_of_zeros(model: nn.Module) -> float:
    """Return the fraction of zeros among the weights of linear layers."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    stored: list[Any] = [getattr(linear, "weight_int8", linear._parameters.get("weight")) for linear in linears]
    n_used = sum(int(weight.count_nonzero()) for weight in stored)
    return 1 - n_used / max(1, sum(weight.numel() for weight in stored))


def _range(sizes: Sequence[int]) -> str:
    return str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
