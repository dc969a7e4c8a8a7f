"""Where the layers of transformers hold their heads, neurons and matrices, for pruning and int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from scllm.models.pruning import BlockParts, Units, rows

__all__ = ["XLNET_MATRICES", "attention_matrices", "layer_parts", "prunable_layers"]

# XLNet's attention weights (d, h, e) are not linear layers; one scale for each output, where `o` maps back to d
XLNET_MATRICES = {"q": (0,), "k": (0,), "v": (0,), "r": (0,), "o": (1, 2)}


def layer_parts(layer: Any) -> BlockParts:
    """Locate heads and neurons of a layer of GPT-2, ALBERT or XLNet."""
    counts: tuple[tuple[Any, str, int], ...]
    match type(layer).__name__:
        case "GPT2Block":
            inner, up, down = layer.attn, layer.mlp.c_fc, layer.mlp.c_proj
            heads = Units((*rows(inner.c_attn, 3), (inner.c_proj, "weight", 1, 1)), inner.num_heads)
            counts = ((inner, "num_heads", 1), (inner, "split_size", inner.head_dim))
        case "AlbertLayer":
            inner, up, down = layer.attention, layer.ffn, layer.ffn_output
            places = (*rows(inner.query), *rows(inner.key), *rows(inner.value), (inner.dense, "weight", 1, 1))
            heads = Units(places, inner.num_attention_heads)
            counts = ((inner, "num_attention_heads", 1), (inner, "all_head_size", inner.attention_head_size))
        case "XLNetLayer":
            inner, up, down = layer.rel_attn, layer.ff.layer_1, layer.ff.layer_2
            matrices = tuple((inner, name, 1, 1) for name in ("q", "k", "v", "o", "r", "seg_embed"))
            biases = tuple((inner, name, 0, 1) for name in ("r_r_bias", "r_s_bias", "r_w_bias"))
            heads, counts = Units((*matrices, *biases), inner.n_head), ((inner, "n_head", 1),)
        case _:
            raise ValueError(
                "Structured pruning expects layers of GPT-2, ALBERT or XLNet in this network, got layers of type "
                f"{type(layer).__name__!r}, whose heads it does not know. Use structured=False."
            )
    return BlockParts(heads, Units((*rows(up), (down, "weight", 1, 1)), up.out_features), counts)


def prunable_layers(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers of a network's blocks; those of ALBERT are in groups."""
    within = [module for block in blocks for module in block.modules()]
    return [layer for layer in within if type(layer).__name__ == "AlbertLayer"] or list(blocks)


def attention_matrices(network: nn.Module) -> list[tuple[nn.Module, dict[str, tuple[int, ...]]]]:
    """Return the modules of a network that multiply by matrices without being linear layers, see ``matrices``."""
    kinds = [module for module in network.modules() if type(module).__name__ == "XLNetRelativeAttention"]
    return [(module, dict(XLNET_MATRICES)) for module in kinds]
