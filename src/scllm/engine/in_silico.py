"""Edited copies of cells: genes that are deleted, overexpressed, or moved in the order of expression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scllm._typing import FloatArray, IntArray
from scllm.data.encode import Encoder, LevelEncoder
from scllm.data.tokens import Tokens
from scllm.models.base import Batch, CellModel

__all__ = ["Edit", "Edited", "Mode", "edited", "edited_batches"]

Mode = Literal["delete", "overexpress"] | float
"""What happens to genes; a number from -1 to 1 is the share of a cell's genes by which they move in its order."""

# tokens and cells of one forward pass on edited cells
_TOKENS, _CELLS = {"cpu": 1 << 15, "cuda": 1 << 19}, {"cpu": 64, "cuda": 1024}


@dataclass(frozen=True)
class Edit:
    """Genes that are changed together, by token, and what happens to them."""

    tokens: tuple[int, ...]
    mode: Mode


@dataclass(frozen=True)
class Edited:
    """Copies of cells of a batch, each with one edit.

    Parameters
    ----------
    batch
        The copies.
    cell, edit
        The cell of the original batch and the edit of each copy, ``(n,)``.
    origin
        Position in the original batch of each token of the copies, ``(t,)``; -1 for the tokens of edited genes.
    """

    batch: Batch
    cell: IntArray
    edit: IntArray
    origin: Tensor


@dataclass(frozen=True)
class _Cell:
    """The token sequence of one cell; ``start`` is its position in the batch."""

    genes: IntArray
    values: FloatArray | None
    special: NDArray[np.bool_]
    start: int

    @property
    def expressed(self) -> NDArray[np.bool_]:
        """Mask of the tokens that are expressed genes."""
        return ~self.special if self.values is None else ~self.special & (self.values > 0)


def edited(cell: _Cell, edit: Edit, encoder: Encoder) -> tuple[IntArray, FloatArray | None, IntArray] | None:
    """Apply an edit to one cell; return genes, values and origins, or ``None`` if the edit changes nothing in it."""
    is_edited = np.isin(cell.genes, edit.tokens)
    n_there = int((is_edited & cell.expressed).sum())
    if edit.mode != "overexpress" and n_there < len(edit.tokens):
        return None
    origin = np.where(is_edited, -1, np.arange(len(cell.genes)) + cell.start)
    if cell.values is None:
        return _of_ranks(cell, edit, is_edited, origin, encoder.max_len)
    return _of_values(cell, edit, is_edited, origin, encoder)


def _of_ranks(cell: _Cell, edit: Edit, is_edited: NDArray[np.bool_], origin: IntArray, max_len: int):
    """Apply an edit to a sequence without values, in which the order of the genes is the order of expression."""
    genes = cell.genes
    if edit.mode == "delete":
        return genes[~is_edited], None, origin[~is_edited]
    places = np.flatnonzero(~cell.special)
    first = int(places[0]) if len(places) else int(cell.special[:1].sum())
    last = int(places[-1]) + 1 if len(places) else first
    inner, inner_origin = genes[first:last], origin[first:last]
    if edit.mode == "overexpress":
        rest = ~is_edited[first:last]
        room = max_len - (len(genes) - (last - first))
        inner = np.concatenate([np.array(edit.tokens, genes.dtype), inner[rest]])[:room]
        inner_origin = np.concatenate([np.full(len(edit.tokens), -1), inner_origin[rest]])[:room]
    else:
        for token in edit.tokens:
            at, n = int(np.flatnonzero(inner == token)[0]), len(inner)
            to = int(np.clip(round(at - float(edit.mode) * n), 0, n - 1))
            order = np.insert(np.delete(np.arange(n), at), to, at)
            inner, inner_origin = inner[order], inner_origin[order]
    return (
        np.concatenate([genes[:first], inner, genes[last:]]),
        None,
        np.concatenate([origin[:first], inner_origin, origin[last:]]),
    )


def _of_values(cell: _Cell, edit: Edit, is_edited: NDArray[np.bool_], origin: IntArray, encoder: Encoder):
    """Apply an edit to a sequence with values, in which tokens are in the order of their ids."""
    genes, values = cell.genes, np.array(cell.values)
    if edit.mode == "delete":
        if isinstance(encoder, LevelEncoder) or getattr(encoder, "include_zeros", False):
            values[is_edited] = 0
            return genes, values, origin
        return genes[~is_edited], values[~is_edited], origin[~is_edited]
    highest = values[cell.expressed].max(initial=1.0)
    if edit.mode == "overexpress":
        values[is_edited] = highest
        absent = sorted(set(edit.tokens) - set(genes[is_edited].tolist()))
        return _inserted(cell, genes, values, origin, absent, highest, encoder.max_len)
    order = np.sort(values[cell.expressed])
    for token in edit.tokens:
        at = int(np.flatnonzero(genes == token)[0])
        left, right = np.searchsorted(order, values[at], "left"), np.searchsorted(order, values[at], "right")
        to = round((left + right - 1) / 2 + float(edit.mode) * len(order))
        values[at] = order[int(np.clip(to, 0, len(order) - 1))]
    return genes, values, origin


def _inserted(cell: _Cell, genes, values, origin, absent: Sequence[int], highest: float, max_len: int):
    """Insert tokens among the genes, in the order of ids; the lowest genes make room where a cell is full."""
    special = cell.special
    surplus = len(genes) + len(absent) - max_len
    if surplus > 0:
        lowest = np.argsort(np.where(special | (origin < 0), np.inf, values), kind="stable")[:surplus]
        kept = np.ones(len(genes), bool)
        kept[lowest] = False
        genes, values, origin, special = genes[kept], values[kept], origin[kept], special[kept]
    for token in absent:
        places = np.flatnonzero(~special)
        first = int(places[0]) if len(places) else int(special[:1].sum() * (genes[:1] > token).sum())
        at = first + int((genes[~special] < token).sum())
        genes, values = np.insert(genes, at, token), np.insert(values, at, highest)
        origin, special = np.insert(origin, at, -1), np.insert(special, at, False)
    return genes, values, origin


def edited_batches(model: CellModel, batch: Batch, edits: Sequence[Edit]) -> Iterator[Edited]:
    """Yield copies of the cells of a batch with every edit that changes them, as many at a time as memory allows."""
    kind = batch.genes.device.type
    cells = _cells(model, batch)
    # an edit is looked up only in the cells that express one of its genes
    holders: dict[int, list[int]] = {}
    for i, cell in enumerate(cells):
        for token in cell.genes[cell.expressed].tolist():
            holders.setdefault(token, []).append(i)
    held, n_tokens = [], 0
    for number, edit in enumerate(edits):
        among = range(len(cells)) if edit.mode == "overexpress" else holders.get(edit.tokens[0], [])
        for i in among:
            copy = edited(cells[i], edit, model.encoder)
            if copy is None:
                continue
            if held and (n_tokens + len(copy[0]) > _TOKENS[kind] or len(held) == _CELLS[kind]):
                yield _packed(batch, held)
                held, n_tokens = [], 0
            held.append((i, number, *copy))
            n_tokens += len(copy[0])
    if held:
        yield _packed(batch, held)


def _cells(model: CellModel, batch: Batch) -> list[_Cell]:
    """Split a batch into cells on the CPU."""
    genes = batch.genes.cpu().numpy()
    values = None if batch.values is None else batch.values.cpu().numpy()
    special = model.is_special.cpu().numpy()[genes]
    ends = np.cumsum([0, *batch.lengths])
    return [_Cell(genes[a:b], None if values is None else values[a:b], special[a:b], int(a)) for a, b in pairwise(ends)]


def _packed(batch: Batch, held: list) -> Edited:
    """Pack edited cells into a batch on the device of the original."""
    cell, edit, genes, values, origin = zip(*held, strict=True)
    indptr = np.concatenate([[0], np.cumsum([len(part) for part in genes])])
    all_values = None if batch.values is None else np.concatenate(values)
    tokens = Tokens(indptr, np.concatenate(genes), all_values)
    keys = batch.keys.cpu().numpy()[list(cell)]
    packed = Batch.from_tokens(tokens, keys).to(batch.genes.device)
    where = torch.from_numpy(np.concatenate(origin)).to(batch.genes.device)
    return Edited(packed, np.array(cell), np.array(edit), where)
