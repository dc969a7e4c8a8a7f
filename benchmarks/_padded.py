"""The same scGPT with ``nn.TransformerEncoder`` on padded cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scllm.models.base import Batch
from scllm.models.scgpt import Model

__all__ = ["PaddedModel"]


class PaddedModel(Model):
    """A model with the weights, embeddings, heads and objective of another one, but PyTorch's own blocks."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.config, model.vocab, model.encoder)
        self.load_state_dict(model.state_dict())
        config = model.config
        layer = nn.TransformerEncoderLayer(config.d_model, config.n_heads, config.d_hidden, 0.0, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, config.n_layers)
        for theirs, ours in zip(self.encode.layers, model.layers, strict=True):
            theirs.self_attn.in_proj_weight.data.copy_(ours.attention.qkv.weight)
            theirs.self_attn.in_proj_bias.data.copy_(ours.attention.qkv.bias)
            theirs.self_attn.out_proj.load_state_dict(ours.attention.out.state_dict())
            for name, module in (("linear1", ours.up), ("linear2", ours.down), ("norm1", ours.norm1)):
                getattr(theirs, name).load_state_dict(module.state_dict())
            theirs.norm2.load_state_dict(ours.norm2.state_dict())
        self.layers = nn.ModuleList()

    def hidden(self, batch: Batch, *, layer: int = -1, first_only: bool = False) -> Tensor:
        """Pad the cells, encode them and remove the padding."""
        packed = self.inputs(batch)
        padding = torch.arange(max(batch.lengths), device=packed.device) >= batch.cu_seqlens.diff()[:, None]
        x = packed.new_zeros(*padding.shape, packed.shape[1])
        x[~padding] = packed
        encoded = self.encode(x, src_key_padding_mask=padding)
        return encoded[:, 0] if first_only else encoded[~padding]
