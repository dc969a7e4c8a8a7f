"""The place of each token in its cell, of cells that are read whole and of random subsets."""

from __future__ import annotations

import torch
from torch import Tensor

from scllm.data.encode import RankEncoder
from scllm.models.batch import Batch

__all__ = ["places"]

_GOLDEN = 0.6180339887498949


def places(batch: Batch, encoder: RankEncoder) -> Tensor:
    """Place of each token, ``(t,)`` int64, that a model with learnt positions reads it at.

    Tokens of a whole cell stand at 0, 1, 2, ... The genes of a random subset are spread over the places that the cell
    would take whole: each is drawn from a stretch of its own. A model that is trained on subsets then knows all the
    places that it reads later, and a gene stands about where it does in the whole cell.
    """
    place = torch.arange(len(batch.genes), device=batch.genes.device) - batch.first[batch.cell]
    if batch.spacing is None:
        return place
    lengths = batch.cu_seqlens.diff().long()
    n_genes = (lengths - encoder.n_specials).clamp(min=1)
    whole = (n_genes * batch.spacing.double()).round().clamp(max=encoder.max_len - encoder.n_specials)
    stretch = (whole / n_genes)[batch.cell]
    first = int(encoder.cls)
    number = place - first
    # a function of the cell's key: any gene of the cell may stand at any place of its stretch
    draw = ((batch.keys[batch.cell] >> 11 & (1 << 53) - 1).double() * 2.0**-53 + number * _GOLDEN) % 1
    start, stop = (number * stretch).ceil(), ((number + 1) * stretch).ceil()
    spread = (start + (draw * (stop - start)).floor()).long() + first
    is_gene = (number >= 0) & (number < n_genes[batch.cell])
    moved = torch.where(is_gene, spread, place + (whole - n_genes).long()[batch.cell])
    return torch.where(number < 0, place, moved)
