"""Negative log-likelihood of each gene in a token sequence, in nats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scllm.engine.objectives.permuted_gene import turns
from scllm.models.base import Batch, CellModel

if TYPE_CHECKING:
    from scllm.models.xlnet import Model

__all__ = ["N_ORDERS", "gene_nats"]

N_ORDERS = 4
"""Number of random orders over which the likelihood of a permutation model is averaged."""

# tokens per forward pass over copies of token sequences: enough to keep a device busy, few enough to fit into memory
_TOKENS = {"cpu": 4_096, "cuda": 262_144}


def gene_nats(model: CellModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the positions of all genes ``(n,)`` and the negative log-probability of each ``(n,)``, in nats.

    The model's ``likelihood`` decides which genes a gene is predicted from:

    - ``"causal"``: the genes before it, so that the sum is the exact likelihood of the token sequence.
    - ``"permutation"``: the genes before it in a random order. Each order gives a likelihood; the result is the mean
      over ``N_ORDERS`` fixed orders.
    - ``"pseudo"``: all other genes. The sum is a pseudo-likelihood, not a likelihood.
    """
    at = (~model.is_special[batch.genes]).nonzero().squeeze(1)
    match model.likelihood:
        case "causal":
            # the first token has no context: without `<cls>`, this is a gene that cannot be predicted
            first = batch.first[torch.tensor(batch.lengths, device=at.device) > 0]
            at = at[~torch.isin(at, first)]
            return at, _nats(model.gene_logits(batch, at), batch.genes[at])
        case "pseudo":
            copies = _each_hidden(model, batch, at)
            found = [_nats(model.gene_logits(shown, hidden), genes) for shown, hidden, genes in copies]
            return at, torch.cat(found) if found else torch.zeros(0, device=at.device)
        case "permutation":
            return at, _permuted(cast("Model", model), batch, at)
    raise ValueError(
        f"Expected a gene language model, got the family {model.family!r}, which has no likelihood of token sequences. "
        "Use 'gpt2', 'albert' or 'xlnet'."
    )


def _nats(logits: Tensor, genes: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), genes, reduction="none")


def _permuted(model: Model, batch: Batch, at: Tensor) -> Tensor:
    """Average over random orders of positions, which are the same for all cells."""
    special = model.is_special[batch.genes]
    place = torch.arange(len(special), device=at.device) - batch.first[batch.cell]
    longest = max(batch.lengths, default=0)
    total = torch.zeros(len(at), device=at.device)
    for number in range(N_ORDERS):
        draws = np.random.default_rng(number).random(longest)
        order = turns(batch, special, torch.from_numpy(draws).to(at.device)[place])
        total += _nats(model.permuted_logits(batch, order, at), batch.genes[at])
    return total / N_ORDERS


def _each_hidden(model: CellModel, batch: Batch, at: Tensor) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Copy token sequences with one gene hidden in each; yield batches, with the hidden genes' positions and ids."""
    cell = batch.cell
    lengths = torch.tensor(batch.lengths, device=at.device)
    ends = lengths[cell[at]].cumsum(0)
    budget = _TOKENS[at.device.type]
    start = 0
    while start < len(at):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(torch.searchsorted(ends, before + budget, right=True)))
        hidden = at[start:stop]
        yield _copies(batch, cell[hidden], lengths, hidden, model.vocab.mask_id)
        start = stop


def _copies(batch: Batch, cells: Tensor, lengths: Tensor, hidden: Tensor, mask_id: int) -> tuple[Batch, Tensor, Tensor]:
    """Copy the token sequences of ``cells``, each with one token masked: the one at a position in ``hidden``."""
    n = lengths[cells]
    starts = F.pad(n.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(batch.first[cells] - starts[:-1], n)
    tokens = torch.arange(len(shift), device=shift.device) + shift
    at = hidden - batch.first[cells] + starts[:-1]
    copies = replace(
        batch,
        genes=batch.genes[tokens].index_fill(0, at, mask_id),
        values=None if batch.values is None else batch.values[tokens],
        cu_seqlens=starts.int(),
        lengths=tuple(n.tolist()),
        keys=batch.keys[cells],
        obs={name: column[cells] for name, column in batch.obs.items()},
    )
    return copies, at, batch.genes[hidden]
