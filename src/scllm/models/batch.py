"""Inputs and outputs of a model: packed cells, and what a forward pass returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scllm._typing import FloatArray, IntArray
from scllm.data.genes import GeneMatch
from scllm.data.tokens import Tokens

__all__ = ["Batch", "Measured", "Outputs"]


@dataclass(frozen=True)
class Measured:
    """Which genes each cell's file measured: a gene that was not measured is not zero.

    Parameters
    ----------
    genes
        Tokens, of one file after the other, ``(m,)`` int64.
    first
        Where those of each cell's file begin, ``(b,)``.
    n
        How many they are, ``(b,)``.
    """

    genes: Tensor
    first: Tensor
    n: Tensor

    @classmethod
    def of(cls, match: GeneMatch, rows: IntArray) -> Measured:
        """For some cells of a source."""
        by_file = match.by_file(rows)
        first, n, begin = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64), 0
        for file, cells in by_file:
            first[cells], n[cells] = begin, len(file.measured)
            begin += len(file.measured)
        genes = np.concatenate([np.empty(0, np.int64), *(file.measured for file, _ in by_file)])
        return cls(torch.from_numpy(genes), torch.from_numpy(first), torch.from_numpy(n))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Every cell with every gene that its file measured: cells and genes, ``(n.sum(),)`` each."""
        cell = torch.repeat_interleave(torch.arange(len(self.n), device=self.n.device), self.n)
        begin = self.first - (self.n.cumsum(0) - self.n)
        return cell, self.genes[torch.arange(len(cell), device=cell.device) + begin[cell]]

    def drawn(self, cell: Tensor, draws: Tensor) -> Tensor:
        """One gene for each of some cells, by a number from 0 up to below 1."""
        return self.genes[self.first[cell] + (draws * self.n[cell]).long()]

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Measured:
        return Measured(change(self.genes), change(self.first), change(self.n))


@dataclass
class Batch:
    """Cells packed one after the other, without padding.

    Parameters
    ----------
    genes
        Token ids, ``(t,)`` int64.
    values
        Value of each token, ``(t,)`` float32; ``None`` if tokens have no values.
    cu_seqlens
        Where each cell begins and ends, ``(b + 1,)`` int32.
    lengths
        Number of tokens of each cell, on the host, so that grouping cells does not wait for the GPU.
    keys
        Keys of each cell's random draws, ``(b,)`` int64.
    obs
        Labels, batch and other columns by name, ``(b,)`` each.
    measured
        Which genes the file of each cell has.
    whole
        The same cells before count downsampling and truncation, for objectives that predict those.
    spacing
        Number of genes of the cell per gene that was read, ``(b,)`` float32, if random subsets of genes were drawn.
    view
        The same cells at other sequencing depths and with other subsets of genes, for relational pretraining.
    """

    genes: Tensor
    values: Tensor | None
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    keys: Tensor
    obs: dict[str, Tensor] = field(default_factory=dict)
    measured: Measured | None = None
    whole: Batch | None = None
    spacing: Tensor | None = None
    view: Batch | None = None

    @classmethod
    def from_tokens(
        cls,
        tokens: Tokens,
        keys: IntArray | None = None,
        obs: Mapping[str, Any] | None = None,
        measured: Measured | None = None,
        whole: Batch | None = None,
        spacing: FloatArray | None = None,
        view: Batch | None = None,
    ) -> Batch:
        """Pack the token sequences of cells."""
        keys = np.zeros(len(tokens), np.int64) if keys is None else keys
        return cls(
            torch.from_numpy(tokens.genes.astype(np.int64)),
            None if tokens.values is None else torch.from_numpy(np.asarray(tokens.values, np.float32)),
            torch.from_numpy(tokens.indptr.astype(np.int32)),
            tuple(tokens.lengths.tolist()),
            torch.from_numpy(np.ascontiguousarray(keys, np.int64)),
            {name: torch.as_tensor(column) for name, column in (obs or {}).items()},
            measured,
            whole,
            None if spacing is None else torch.from_numpy(spacing.astype(np.float32)),
            view,
        )

    @property
    def n_cells(self) -> int:
        """Number of cells in the batch."""
        return len(self.lengths)

    @property
    def first(self) -> Tensor:
        """Position of each cell's first token, ``(b,)``."""
        return self.cu_seqlens[:-1].long()

    @property
    def cell(self) -> Tensor:
        """Index of the cell of each token, ``(t,)`` int64."""
        cells = torch.arange(self.n_cells, device=self.genes.device)
        return torch.repeat_interleave(cells, self.cu_seqlens.diff().long(), output_size=len(self.genes))

    @property
    def experiment(self) -> Tensor:
        """Experimental batch of each cell, ``(b,)``."""
        if "batch" not in self.obs:
            raise ValueError(
                "Expected codes of experimental batches in batch.obs['batch'], because the model was built with "
                "n_batches. Use a model without batches."
            )
        return self.obs["batch"]

    def with_genes(self, genes: Tensor) -> Batch:
        """Return the same cells with other tokens."""
        return replace(self, genes=genes)

    def with_values(self, values: Tensor) -> Batch:
        """Return the same cells with other values."""
        return replace(self, values=values)

    def without(self, positions: Tensor, n_removed: Sequence[int]) -> Batch:
        """Return the same cells without the tokens at ``positions``, ``n_removed`` of each cell."""
        kept = torch.ones_like(self.genes, dtype=torch.bool).index_fill(0, positions, False)
        lengths = tuple(n - removed for n, removed in zip(self.lengths, n_removed, strict=True))
        ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        return replace(
            self,
            genes=self.genes[kept],
            values=None if self.values is None else self.values[kept],
            cu_seqlens=ends.to(self.genes.device, non_blocking=True),
            lengths=lengths,
        )

    def cells(self, first: int, last: int) -> Batch:
        """Return the cells from ``first`` to before ``last``, without waiting for the GPU."""
        begin, end = sum(self.lengths[:first]), sum(self.lengths[:last])
        measured = self.measured
        return Batch(
            self.genes[begin:end],
            None if self.values is None else self.values[begin:end],
            self.cu_seqlens[first : last + 1] - begin,
            self.lengths[first:last],
            self.keys[first:last],
            {name: column[first:last] for name, column in self.obs.items()},
            None if measured is None else replace(measured, first=measured.first[first:last], n=measured.n[first:last]),
            None if self.whole is None else self.whole.cells(first, last),
            None if self.spacing is None else self.spacing[first:last],
            None if self.view is None else self.view.cells(first, last),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Move the batch to a device, without waiting for it."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return self._mapped(move)

    def pin(self) -> Batch:
        """Return a copy in pinned memory, so that moving it to a GPU overlaps with computing."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.genes),
            None if self.values is None else change(self.values),
            change(self.cu_seqlens),
            self.lengths,
            change(self.keys),
            {name: change(column) for name, column in self.obs.items()},
            None if self.measured is None else self.measured._mapped(change),
            None if self.whole is None else self.whole._mapped(change),
            None if self.spacing is None else change(self.spacing),
            None if self.view is None else self.view._mapped(change),
        )

    def padded(self, *, pad_id: int, pad_value: float = 0) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return genes, values and padding (``True`` where there is no token), each ``(b, l)``."""
        width = max(self.lengths, default=1)
        lengths = self.cu_seqlens.diff().long()
        padding = torch.arange(width, device=self.genes.device) >= lengths[:, None]
        genes = self.genes.new_full(padding.shape, pad_id)
        genes[~padding] = self.genes
        if self.values is None:
            return genes, None, padding
        values = self.values.new_full(padding.shape, pad_value)
        values[~padding] = self.values
        return genes, values, padding


@dataclass
class Outputs:
    """Results of a forward pass.

    Parameters
    ----------
    hidden
        Hidden state of each token after the last block, ``(t, d)``.
    cell
        Embedding of each cell, ``(b, d)``.
    heads
        Predictions by name: per token ``(t,)``, or per cell ``(b, k)``.
    """

    hidden: Tensor
    cell: Tensor
    heads: dict[str, Tensor]
