"""Losses and counts, summed over micro-batches and ranks and divided once at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from scllm.engine import ranks
from scllm.engine.objectives import Loss
from scllm.models.base import Batch

__all__ = ["Sums", "Totals"]


@dataclass(frozen=True)
class Totals:
    """What was computed over all micro-batches and ranks."""

    means: dict[str, float]  # losses, divided by `count`
    count: float
    n_cells: int
    n_tokens: int
    flops: float  # counted operations, 0 if they cannot be counted
    asked: bool  # whether a rank asks for a checkpoint

    def with_term(self, name: str, mean: float, weight: float) -> Totals:
        """Return the same with another term of the loss, which has a count of its own."""
        return replace(self, means={**self.means, "loss": self.means["loss"] + weight * mean, name: mean})


class Sums:
    """Sums over micro-batches and ranks, which are divided once at the end."""

    def __init__(
        self, names: Sequence[str], device: torch.device, flops: Callable[[Batch], float] | None = None
    ) -> None:
        # with all names from the start, because ranks without cells take part in the sum too
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("loss", *names)}
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.n_cells = self.n_tokens = 0
        self.flops, self.count_flops = 0.0, flops

    def add(self, loss: Loss, batch: Batch) -> None:
        """Add a micro-batch of this rank."""
        for name, value in {"loss": loss.sum, **loss.logged}.items():
            self.sums[name] += value.detach()
        self.count += loss.count
        self.n_cells += batch.n_cells
        self.n_tokens += len(batch.genes)
        if self.count_flops is not None:
            self.flops += self.count_flops(batch)

    def reduced(self, asked: bool = False) -> Totals:
        """Sum over ranks."""
        sizes = self.count.new_tensor([self.n_cells, self.n_tokens, self.flops, asked])
        flat = torch.cat([torch.stack([*self.sums.values(), self.count]), sizes])
        ranks.sum_over_ranks(flat)
        *sums, count, n_cells, n_tokens, flops, n_asked = flat.tolist()
        means = {name: value / max(count, 1) for name, value in zip(self.sums, sums, strict=True)}
        return Totals(means, count, int(n_cells), int(n_tokens), flops, n_asked > 0)
