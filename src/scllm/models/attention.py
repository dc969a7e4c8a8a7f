"""Attention within the cells of a packed batch, in the fastest way that the device offers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from scllm.models.batch import Batch
from scllm.models.rectangles import rectangles

__all__ = ["attend", "has_varlen"]

# of the fused kernels: a head's width must be a multiple of the first and at most the second
_STEP, _WIDEST = 8, 256
_AMPERE = 8


def attend(query: Tensor, key: Tensor, value: Tensor, batch: Batch, *, first_only: bool = False) -> Tensor:
    """Compute attention within each cell of a packed batch.

    Parameters
    ----------
    query
        ``(t, h, d / h)``; with ``first_only``, only of the first token of each cell, ``(b, h, d / h)``.
    key, value
        ``(t, h, d / h)``.
    batch
        Where the cells begin and end.
    first_only
        Whether only the first token of each cell has a query. The result is zero for cells without tokens.
    """
    if not batch.n_cells:
        return query
    if not query.is_cuda:
        return _attend_by_cell(query, key, value, batch, first_only)
    if has_varlen(torch.cuda.get_device_capability(query.device), query.dtype, query.shape[-1]):
        return _attend_varlen(query, key, value, batch, first_only)
    return attend_in_rectangles(query, key, value, batch, first_only)


def has_varlen(capability: tuple[int, int], dtype: torch.dtype, d_head: int) -> bool:
    """Return whether a GPU of this compute capability has flash attention over cells of any length.

    It needs Ampere (8.0) or later, half precision, and heads whose width is a multiple of 8 and at most 256.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return capability[0] >= _AMPERE and half and d_head % _STEP == 0 and d_head <= _WIDEST


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, batch: Batch, first_only: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes a second

    ends, longest = batch.cu_seqlens, max(batch.lengths)
    ones = torch.arange(batch.n_cells + 1, device=query.device, dtype=torch.int32)
    asked, most = (ones, 1) if first_only else (ends, longest)
    return cast(Tensor, varlen_attn(query, key, value, asked, ends, most, longest))


def attend_in_rectangles(query: Tensor, key: Tensor, value: Tensor, batch: Batch, first_only: bool) -> Tensor:
    """Compute the same with padded attention over groups of cells of similar length, in a few launches each."""
    at, d_head = rectangles(tuple(batch.lengths), query.device), query.shape[-1]
    # zeros change no product, and the fused kernels take only such widths
    query, key, value = (F.pad(x, (0, -d_head % _STEP)) for x in (query, key, value))
    asked = [query[cells][:, None] for cells in at.cells] if first_only else at.split(query)
    found = []
    for q, k, v, there in zip(asked, at.split(key), at.split(value), at.there, strict=True):
        mask = None if there is None else there[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (n, h, l, d / h)
        found.append(F.scaled_dot_product_attention(q, k, v, mask, scale=d_head**-0.5).transpose(1, 2))
    if not found:
        return query[..., :d_head] * 0
    if not first_only:
        return at.join(found)[..., :d_head]
    of_cell = torch.cat(found).flatten(0, 1)[..., :d_head]
    return F.pad(of_cell, (0, 0, 0, 0, 0, 1))[at.order]  # the row of zeros is that of cells without tokens


def _attend_by_cell(query: Tensor, key: Tensor, value: Tensor, batch: Batch, first_only: bool) -> Tensor:
    """Compute the same cell by cell: on a CPU in half the time of rectangles, whose padding is copied and computed."""
    lengths = list(batch.lengths)
    queries = query.split([1] * batch.n_cells if first_only else lengths)
    cells = [_attend_cell(*cell) for cell in zip(queries, key.split(lengths), value.split(lengths), strict=True)]
    return torch.cat(cells)


def _attend_cell(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention of one cell, ``(l, h, d / h)``."""
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))  # (h, l, d / h)
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        # bf16 matrix products are faster than the fused CPU kernel, which computes in fp32
        scores = torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
        return torch.bmm(scores.float().softmax(-1).to(v.dtype), v).transpose(0, 1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
