"""Attention with linear cost by positive random features: FAVOR+ (Choromanski et al., ICLR 2021, arXiv:2009.14794).

The softmax kernel ``exp(q . k)`` is the expectation of ``exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2)`` over normal
``w``. With a fixed draw of ``w`` (the projection), the keys of a cell are summed once and every query reads the sum, so
time and memory grow linearly with the number of genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from scllm.kernels.draws import mix
from scllm.models.base import Batch
from scllm.models.pruning import BlockParts, Units, rows
from scllm.models.rectangles import rectangles

__all__ = ["KeyMaximum", "PerformerAttention", "PerformerBlock", "attend_linearly", "original_names", "redraw"]

KeyMaximum = Literal["cell", "batch"]

# keeps every feature positive; because of it, the maximum subtracted from the keys does not cancel exactly
_FLOOR = 1e-4
# Numbers of features that are held at a time: on a CPU, those of some hundred tokens, which stay in the caches; on a
# GPU, 256 MB, so that there are few launches.
_HELD = {"cpu": 1 << 20, "cuda": 1 << 26}


def attend_linearly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    lengths: Sequence[int],
    key_maximum: KeyMaximum,
    *,
    cell_by_cell: bool | None = None,
) -> Tensor:
    """Compute attention within each cell of a packed batch, in float32 at least.

    The features are many times larger than queries and keys. They are held for a part of the tokens at a time and
    computed again in the backward pass, for which only queries, keys, values and one matrix per cell and head are kept.

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
    cell_by_cell
        Whether to loop over cells, or to compute cells of similar length together, padded, in a few launches.
        ``None``: over cells on a CPU.
    """
    if not any(lengths):
        # a rank without cells: all three must take part in the backward pass
        return query + key + value
    if cell_by_cell is None:
        cell_by_cell = not query.is_cuda
    if cell_by_cell:
        split = zip(*(packed.transpose(0, 1)[None].split(list(lengths), dim=2) for packed in (query, key, value)))
        cells = [cell for cell in split if cell[0].shape[2]]
        found = _attend(cells, [None] * len(cells), projection, key_maximum)
        return torch.cat(found, dim=2)[0].transpose(0, 1)
    at = rectangles(tuple(lengths), query.device)
    padded = zip(*([x.transpose(1, 2) for x in at.split(packed)] for packed in (query, key, value)))
    found = _attend(list(padded), at.there, projection, key_maximum)
    return at.join([part.transpose(1, 2) for part in found])


def _attend(
    cells: Sequence[tuple[Tensor, ...]], there: Sequence[Tensor | None], projection: Tensor, key_maximum: KeyMaximum
) -> list[Tensor]:
    """Compute attention of groups of cells of one length, ``(n, h, l, e)`` each; ``there`` marks what is no padding."""
    # padding repeats a token of the same cell, and so does not change the maximum
    highest = [_highest(key, projection) for _, key, _ in cells]
    if key_maximum == "batch":
        highest = [torch.stack([of_cells.amax() for of_cells in highest]).amax()] * len(cells)
    groups = zip(cells, highest, there, strict=True)
    return [cast(Tensor, _LinearAttention.apply(*cell, projection, most, inside)) for cell, most, inside in groups]


class _LinearAttention(torch.autograd.Function):
    """Linear attention of cells of one length, with features that are computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, projection: Tensor, highest: Tensor, there: Tensor | None
    ) -> Tensor:
        """Compute the weighted means of values, ``(n, h, l, e)``; the maximum of the keys counts as a constant."""
        with torch.autocast(query.device.type, enabled=False):
            gathered = sum(
                _features(key[:, :, at], projection, highest).transpose(2, 3) @ _with_ones(value, there, at)
                for at in _parts(key, projection)
            )
            found = torch.empty_like(query)
            for at in _parts(query, projection):
                both = _features(query[:, :, at], projection) @ gathered
                found[:, :, at] = both[..., :-1] / both[..., -1:]
        ctx.save_for_backward(query, key, value, projection, highest, there, gathered)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of queries, keys and values."""
        query, key, value, projection, highest, there, gathered = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
        of_gathered = torch.zeros_like(gathered)
        with torch.autocast(query.device.type, enabled=False):
            for at in _parts(query, projection):
                features = _features(query[:, :, at], projection)
                both = features @ gathered
                of_mean = gradient[:, :, at] / both[..., -1:]
                of_norm = -(of_mean * both[..., :-1]).sum(-1, keepdim=True) / both[..., -1:]
                of_both = torch.cat([of_mean, of_norm], dim=-1)
                of_gathered += features.transpose(2, 3) @ of_both
                of_features = of_both @ gathered.transpose(2, 3)
                of_query[:, :, at] = _through_features(query[:, :, at], projection, features, of_features)
            for at in _parts(key, projection):
                features = _features(key[:, :, at], projection, highest)
                of_value[:, :, at] = (features @ of_gathered)[..., :-1]
                of_features = _with_ones(value, there, at) @ of_gathered.transpose(2, 3)
                of_key[:, :, at] = _through_features(key[:, :, at], projection, features, of_features)
        if there is not None:
            of_value *= there[:, None, :, None]
        return of_query, of_key, of_value, None, None, None


def _parts(x: Tensor, projection: Tensor) -> list[slice]:
    """Split the tokens of cells, ``(n, h, l, e)``, so that the features of a part are not many."""
    n, n_heads, length, _ = x.shape
    step = max(1, _HELD.get(x.device.type, _HELD["cpu"]) // (n * n_heads * len(projection)))
    return [slice(begin, begin + step) for begin in range(0, length, step)]


def _with_ones(value: Tensor, there: Tensor | None, at: slice) -> Tensor:
    """Return values with a column of ones, so that one product gives the weighted sum and the sum of the weights."""
    both = F.pad(_at_least_float(value[:, :, at]), (0, 1), value=1.0)
    return both if there is None else both * there[:, None, at, None]


@torch.no_grad()
def _highest(key: Tensor, projection: Tensor) -> Tensor:
    """Return the largest exponent of each cell's keys, ``(n, 1, 1, 1)``."""
    with torch.autocast(key.device.type, enabled=False):
        parts = [_exponents(key[:, :, at], projection).amax((1, 2, 3)) for at in _parts(key, projection)]
    return torch.stack(parts).amax(0)[:, None, None, None]


def _exponents(x: Tensor, projection: Tensor) -> Tensor:
    """Compute ``w . x`` for each feature, ``(n, h, l, e)`` to ``(n, h, l, m)``, with ``x`` scaled by ``e ** -0.25``."""
    x = _at_least_float(x)
    return (x * x.shape[-1] ** -0.25) @ projection.to(x.dtype).T


def _features(x: Tensor, projection: Tensor, highest: Tensor | None = None) -> Tensor:
    """Compute the features of keys with their maximum, and those of queries, each with its own maximum."""
    exponents = _exponents(x, projection)
    highest = exponents.amax(-1, keepdim=True) if highest is None else highest
    half_square = _at_least_float(x).square().sum(-1, keepdim=True) / (2 * math.sqrt(x.shape[-1]))
    return exponents.sub_(half_square + highest).exp_().add_(_FLOOR).mul_(len(projection) ** -0.5)


def _through_features(x: Tensor, projection: Tensor, features: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of ``x`` from that of its features, whose maximum is a constant; overwrites ``gradient``."""
    # the derivative of the exponential is the exponential
    of_exponents = gradient.mul_(features - _FLOOR * len(projection) ** -0.5)
    x = _at_least_float(x)
    of_square = of_exponents.sum(-1, keepdim=True) / math.sqrt(x.shape[-1])
    return x.shape[-1] ** -0.25 * (of_exponents @ projection.to(x.dtype)) - x * of_square


def _at_least_float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        if self.checkpointing and torch.is_grad_enabled():
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

    def parts(self) -> BlockParts:
        """Locate heads and neurons for pruning."""
        inner = self.attention
        places = (*rows(inner.query), *rows(inner.key), *rows(inner.value), (inner.out, "weight", 1, 1))
        neurons = Units((*rows(self.up), (self.down, "weight", 1, 1)), self.up.out_features)
        return BlockParts(Units(places, inner.n_heads), neurons, ((inner, "n_heads", 1),))

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
