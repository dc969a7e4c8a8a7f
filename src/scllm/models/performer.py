"""Attention with linear cost by positive random features: FAVOR+ (Choromanski et al., ICLR 2021, arXiv:2009.14794).

The softmax kernel ``exp(q . k)`` is the expectation of ``exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)`` over normal
``w``. With a fixed draw of ``w`` (the projection), the keys of a cell are summed once and every query reads the sum, so
time and memory grow linearly with the number of genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scllm.kernels.draws import mix
from scllm.models.base import Batch

__all__ = ["KeyMaximum", "PerformerAttention", "PerformerBlock", "attend_linearly", "original_names", "redraw"]

KeyMaximum = Literal["cell", "batch"]

# keeps every feature positive; because of it, the maximum subtracted from the keys does not cancel exactly
_FLOOR = 1e-4
# tokens whose features are held at a time, so that they stay in the caches and memory does not grow with the cell
_PART = 512


def attend_linearly(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, lengths: Sequence[int], key_maximum: KeyMaximum
) -> Tensor:
    """Compute attention within each cell of a packed batch, in float32.

    Parameters
    ----------
    query, key, value
        ``(t, h, e)``.
    projection
        ``(m, e)``, one random feature per row.
    lengths
        Tokens of each cell.
    key_maximum
        Which maximum is subtracted from the keys' exponents: that of the same cell, or that of the whole batch, as in
        scBERT and scFoundation. With the latter, the result of a cell depends on the other cells of the batch.
    """
    if not len(lengths):
        # a rank without cells: all three must take part in the backward pass
        return query + key + value
    with torch.autocast(query.device.type, enabled=False):
        cells = [x.float().transpose(0, 1).split(list(lengths), dim=1) for x in (query, key, value)]
        weights = projection.float()
        highest = max(_highest(k, weights) for k in cells[1]) if key_maximum == "batch" else None
        attended = [_attend_cell(q, k, v, weights, highest) for q, k, v in zip(*cells, strict=True)]
    return torch.cat(attended, dim=1).transpose(0, 1).to(query.dtype)


def _attend_cell(query: Tensor, key: Tensor, value: Tensor, projection: Tensor, highest: Tensor | None) -> Tensor:
    """Compute attention of one cell, ``(h, l, e)``, for a chunk of its tokens at a time."""
    highest = _highest(key, projection) if highest is None else highest
    # with a column of ones next to the values, one product gives the weighted sum and the sum of the weights
    parts = zip(key.split(_PART, dim=1), F.pad(value, (0, 1), value=1.0).split(_PART, dim=1), strict=True)
    gathered = sum(_features(k, _exponents(k, projection), highest).transpose(1, 2) @ v for k, v in parts)
    found = []
    for asked in query.split(_PART, dim=1):
        exponents = _exponents(asked, projection)
        found.append(_features(asked, exponents, exponents.detach().amax(-1, keepdim=True)) @ gathered)
    both = torch.cat(found, dim=1)
    return both[..., :-1] / both[..., -1:]


@torch.no_grad()
def _highest(key: Tensor, projection: Tensor) -> Tensor:
    return torch.stack([_exponents(part, projection).amax() for part in key.split(_PART, dim=1)]).amax()


def _exponents(x: Tensor, projection: Tensor) -> Tensor:
    """Compute ``w . x`` for each feature, ``(h, l, e)`` to ``(h, l, m)``, with ``x`` scaled by ``e ** -0.25``."""
    return (x * x.shape[-1] ** -0.25) @ projection.T


def _features(x: Tensor, exponents: Tensor, highest: Tensor) -> Tensor:
    half_square = x.square().sum(-1, keepdim=True) / (2 * math.sqrt(x.shape[-1]))
    return exponents.shape[-1] ** -0.5 * ((exponents - half_square - highest).exp() + _FLOOR)


class PerformerAttention(nn.Module):
    """Multi-head self-attention with linear cost.

    Parameters
    ----------
    d_model
        Width of the tokens.
    n_heads, d_head
        Number of heads and width of each; their total width may differ from ``d_model``.
    qkv_bias
        Whether queries, keys and values have a bias.
    key_maximum
        See :func:`attend_linearly`.
    """

    projection: Tensor

    def __init__(self, d_model: int, n_heads: int, d_head: int, qkv_bias: bool, key_maximum: KeyMaximum) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.key_maximum: KeyMaximum = key_maximum
        width = n_heads * d_head
        self.query = nn.Linear(d_model, width, qkv_bias)
        self.key = nn.Linear(d_model, width, qkv_bias)
        self.value = nn.Linear(d_model, width, qkv_bias)
        self.out = nn.Linear(width, d_model)
        n_features = int(d_head * math.log(d_head))
        # saved like a weight, because other features give other outputs
        self.register_buffer("projection", _orthogonal_features(n_features, d_head, None))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """``(t, d)`` to ``(t, d)``."""
        query, key, value = (part(x).unflatten(1, (self.n_heads, -1)) for part in (self.query, self.key, self.value))
        attended = attend_linearly(query, key, value, self.projection, batch.lengths, self.key_maximum)
        return self.out(attended.flatten(1))

    def draw(self, generator: torch.Generator) -> None:
        """Redraw the random features."""
        self.projection.copy_(_orthogonal_features(len(self.projection), self.projection.shape[1], generator))


def _orthogonal_features(n_features: int, d_head: int, generator: torch.Generator | None) -> Tensor:
    """Draw normal vectors, orthogonal in blocks for less variance than independent ones (section 3.2 of the paper)."""
    blocks = []
    for _ in range(math.ceil(n_features / d_head)):
        directions, _ = torch.linalg.qr(torch.randn(d_head, d_head, generator=generator))
        blocks.append(directions.T)
    norms = torch.randn(n_features, d_head, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:n_features] * norms


def redraw(model: nn.Module, step: int, seed: int, every: int | None) -> None:
    """Redraw random features every ``every`` steps, so that the weights do not overfit one draw.

    The features depend only on the step and the seed, so they are the same for any number of processes and
    micro-batches, and after a crash.
    """
    if every is None or step == 0 or step % every:
        return
    attentions = [module for module in model.modules() if isinstance(module, PerformerAttention)]
    for number, attention in enumerate(attentions):
        if attention.training:
            generator = torch.Generator().manual_seed(int(mix(seed, step, number)) & (1 << 63) - 1)
            attention.draw(generator)


class PerformerBlock(nn.Module):
    """Pre-norm block with linear attention and a feed-forward layer with GELU."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        d_hidden: int,
        dropout: float,
        qkv_bias: bool,
        key_maximum: KeyMaximum,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = PerformerAttention(d_model, n_heads, d_head, qkv_bias, key_maximum)
        self.norm2 = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, d_hidden)
        self.down = nn.Linear(d_hidden, d_model)
        self.dropout = nn.Dropout(dropout)
        self.checkpointing = False
        # no bound method, which would keep the block alive until the next garbage collection
        self._rest = PerformerBlock._feed_forward

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """``(t, d)`` to ``(t, d)``."""
        if self.checkpointing and self.training:
            return checkpoint(self._all, x, batch, use_reentrant=False)
        return self._all(x, batch)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations per token: linear layers, and five products with the random features."""
        linear = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        return 2 * (linear + 5 * len(self.attention.projection) * self.attention.query.out_features)

    def compile_feed_forward(self) -> None:
        """Compile the part after the attention; the attention has another shape in every batch."""
        self._rest = torch.compile(PerformerBlock._feed_forward, dynamic=True)

    def _all(self, x: Tensor, batch: Batch) -> Tensor:
        return self._rest(self, x, self.attention(self.norm1(x), batch))

    def _feed_forward(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm2(x))))))


def original_names(theirs: str, ours: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of weight names: those of the Performer in scBERT and scFoundation, and ours."""
    return (
        (f"{theirs}net.layers.#.0.norm.", f"{ours}#.norm1."),
        (f"{theirs}net.layers.#.0.fn.fast_attention.projection_matrix", f"{ours}#.attention.projection"),
        (f"{theirs}net.layers.#.0.fn.to_q.", f"{ours}#.attention.query."),
        (f"{theirs}net.layers.#.0.fn.to_k.", f"{ours}#.attention.key."),
        (f"{theirs}net.layers.#.0.fn.to_v.", f"{ours}#.attention.value."),
        (f"{theirs}net.layers.#.0.fn.to_out.", f"{ours}#.attention.out."),
        (f"{theirs}net.layers.#.1.norm.", f"{ours}#.norm2."),
        (f"{theirs}net.layers.#.1.fn.fn.w1.", f"{ours}#.up."),
        (f"{theirs}net.layers.#.1.fn.fn.w2.", f"{ours}#.down."),
    )
