"""Layers shared by model families: transformer blocks, embeddings of values, heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scllm.models.attention import attend
from scllm.models.base import Batch
from scllm.models.entries import entry
from scllm.models.int8 import has_plain_weights
from scllm.models.pruning import BlockParts, Units, rows

__all__ = [
    "Attention",
    "BinTable",
    "Block",
    "CellDecoder",
    "CellToGenes",
    "ClassHead",
    "GradientReversal",
    "ValueNetwork",
    "linear_cross_entropy",
    "mlp",
]

CellDecoder = Literal["inner product", "inner product, detach", "concat query", "sum query"]

_LOGIT_ROWS = 4096
_HIGHEST_VALUE = 512  # scGPT clamps its continuous input to this value


class Attention(nn.Module):
    """Multi-head self-attention with one ``qkv`` and one ``out`` projection.

    Attention weights have no dropout, because the fused kernels have none. If heads were pruned, ``n_heads * d_head``
    is smaller than ``d_model``.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_head or d_model // n_heads
        width = n_heads * self.d_head
        self.qkv = nn.Linear(d_model, 3 * width)
        self.out = nn.Linear(width, d_model)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """``(t, d)`` to ``(t, d)``."""
        query, key, value = self.qkv(x).view(len(x), 3, self.n_heads, self.d_head).unbind(1)
        return self.out(attend(query, key, value, batch).flatten(1))

    def first(self, x: Tensor, batch: Batch) -> Tensor:
        """Compute attention of the first token of each cell, ``(t, d)`` to ``(b, d)``."""
        if not has_plain_weights(self.qkv):
            query, key, value = self.qkv(x).view(len(x), 3, self.n_heads, self.d_head).unbind(1)
            attended = attend(query[batch.first], key, value, batch, first_only=True)
            return self.out(attended.flatten(1))
        weight, bias, width = self.qkv.weight, self.qkv.bias, self.out.in_features
        query = F.linear(x[batch.first], weight[:width], bias[:width]).view(batch.n_cells, self.n_heads, self.d_head)
        key, value = F.linear(x, weight[width:], bias[width:]).view(len(x), 2, self.n_heads, self.d_head).unbind(1)
        return self.out(attend(query, key, value, batch, first_only=True).flatten(1))

    def weights(self, x: Tensor, batch: Batch) -> list[Tensor]:
        """Compute attention weights of each cell, ``(h, l, l)``."""
        query, key, _ = self.qkv(x).view(len(x), 3, self.n_heads, self.d_head).unbind(1)
        lengths = list(batch.lengths)
        pairs = zip(query.split(lengths), key.split(lengths), strict=True)
        return [(torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5).softmax(-1) for q, k in pairs]


class Block(nn.Module):
    """Post-norm transformer block (Vaswani et al. 2017) with ReLU; BERT's has no dropout inside the feed-forward."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_hidden: int,
        dropout: float,
        norm_eps: float = 1e-5,
        inner: bool = True,
        d_head: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = Attention(d_model, n_heads, d_head)
        self.norm1 = nn.LayerNorm(d_model, norm_eps)
        self.up = nn.Linear(d_model, d_hidden)
        self.down = nn.Linear(d_hidden, d_model)
        self.norm2 = nn.LayerNorm(d_model, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.inner_dropout = self.dropout if inner else nn.Identity()
        self.checkpointing = False
        # no bound method, which would keep the block alive until the next garbage collection
        self._rest = Block._feed_forward

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """``(t, d)`` to ``(t, d)``."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._all, x, batch, use_reentrant=False)
        return self._all(x, batch)

    def compile_feed_forward(self) -> None:
        """Compile the part after the attention; the attention has another shape in every batch."""
        self._rest = torch.compile(Block._feed_forward, dynamic=True)

    def parts(self) -> BlockParts:
        """Locate heads and neurons for pruning."""
        inner = self.attention
        heads = Units((*rows(inner.qkv, 3), (inner.out, "weight", 1, 1)), inner.n_heads)
        neurons = Units((*rows(self.up), (self.down, "weight", 1, 1)), self.up.out_features)
        return BlockParts(heads, neurons, ((inner, "n_heads", 1),))

    def _all(self, x: Tensor, batch: Batch) -> Tensor:
        return self._rest(self, x, self.attention(x, batch))

    @entry
    def first(self, x: Tensor, batch: Batch) -> Tensor:
        """Compute the block's output at the first token of each cell only, ``(t, d)`` to ``(b, d)``."""
        return self._rest(self, x[batch.first], self.attention.first(x, batch))

    def _feed_forward(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.down(self.inner_dropout(F.relu(self.up(x))))))


class ValueNetwork(nn.Module):
    """Embed a continuous value."""

    def __init__(self, d_model: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(1, d_model)
        self.out = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values: Tensor) -> Tensor:
        """``(t,)`` to ``(t, d)``."""
        x = values.clamp(max=_HIGHEST_VALUE)[:, None].to(self.up.weight.dtype)
        return self.dropout(self.norm(self.out(F.relu(self.up(x)))))


class BinTable(nn.Module):
    """Embed a bin."""

    def __init__(self, n_bins: int, d_model: int) -> None:
        super().__init__()
        self.table = nn.Embedding(n_bins, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, values: Tensor) -> Tensor:
        """``(t,)`` to ``(t, d)``."""
        return self.norm(self.table(values.long()))


class CellToGenes(nn.Module):
    """Predict the expression of genes from the cell embedding alone (MVC or GEPC in the original)."""

    def __init__(self, style: CellDecoder, d_model: int, d_cell: int, explicit_zero_prob: bool) -> None:
        super().__init__()
        self.style = style
        if style in ("inner product", "inner product, detach"):
            self.query = nn.Linear(d_model, d_model)
            self.weight = nn.Linear(d_model, d_cell, bias=False)
            self.zero_weight = nn.Linear(d_model, d_cell) if explicit_zero_prob else None
        else:
            if explicit_zero_prob:
                raise ValueError(
                    "Expected an 'inner product' cell decoder with explicit_zero_prob, got "
                    f"cell_decoder={style!r}. Change one of them."
                )
            d_query = 64 if style == "concat query" else d_model
            self.query = nn.Linear(d_model, d_query)
            self.up = nn.Linear(d_cell + d_query if style == "concat query" else d_model, 64)
            self.activation = nn.PReLU()
            self.out = nn.Linear(64, 1)

    def forward(self, cell: Tensor, genes: Tensor, cell_of: Tensor) -> dict[str, Tensor]:
        """Map ``(b, d_cell)`` cells and ``(n, d)`` genes to ``(n,)`` ``cell_value`` and ``cell_zero`` logits."""
        if self.style == "inner product, detach":
            genes = genes.detach()
        query = torch.sigmoid(self.query(genes))
        of_gene = cell[cell_of]
        if self.style == "concat query":
            h = self.activation(self.up(torch.cat([of_gene, query], dim=1)))
            return {"cell_value": self.out(h).squeeze(1)}
        if self.style == "sum query":
            return {"cell_value": self.out(self.activation(self.up(of_gene + query))).squeeze(1)}
        predicted = {"cell_value": (self.weight(query) * of_gene).sum(1)}
        if self.zero_weight is not None:
            predicted["cell_zero"] = (self.zero_weight(query) * of_gene).sum(1)
        return predicted


class ClassHead(nn.Module):
    """Linear layers with activation and norm, then a linear output: scGPT's classifier and batch discriminator."""

    def __init__(self, d_model: int, n_outputs: int, n_layers: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(n_layers - 1):
            layers += [nn.Linear(d_model, d_model), activation(), nn.LayerNorm(d_model)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(d_model, n_outputs)

    def forward(self, cell: Tensor) -> Tensor:
        """``(b, d)`` to ``(b, k)``."""
        return self.out(self.layers(cell))


def mlp(d_in: int, d_model: int) -> nn.Sequential:
    """Make three linear layers with leaky ReLUs between them and one output."""
    return nn.Sequential(
        nn.Linear(d_in, d_model), nn.LeakyReLU(), nn.Linear(d_model, d_model), nn.LeakyReLU(), nn.Linear(d_model, 1)
    )


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Sum the cross-entropy of ``x weight^T + bias`` over rows ``(n, d)``, without ever holding all logits.

    It processes some thousand rows at a time and recomputes their logits for the gradient. torch's own
    ``F.linear_cross_entropy``, which does not keep logits either, took three times as long on a CPU.
    """
    if len(x) <= _LOGIT_ROWS:
        return _summed_cross_entropy(x, weight, bias, target)
    parts = zip(x.split(_LOGIT_ROWS), target.split(_LOGIT_ROWS), strict=True)
    return torch.stack(
        [checkpoint(_summed_cross_entropy, part, weight, bias, of, use_reentrant=False) for part, of in parts]
    ).sum()


def _summed_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction="sum")


class GradientReversal(torch.autograd.Function):
    """Identity in the forward pass, negated gradient in the backward pass (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Negate the gradient."""
        return -gradients[0]
