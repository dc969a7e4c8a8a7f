"""How a model links genes: attention, similar embeddings, and effects of deletions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scllm._log import details
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.engine.config import Precision
from scllm.engine.in_silico import Edit, edited_batches
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel

__all__ = ["Reader"]

_HELD = 16
# numbers of the sums of all heads that are held
_MOST_SUMS = 1 << 28


@dataclass(frozen=True)
class Reader:
    """A model that reads cells, and the genes whose links are asked for.

    Parameters
    ----------
    model, source, match
        The model, the cells, and the token of each of their genes.
    tokens
        Tokens of the genes, ``(m,)``.
    device, precision
        Where and how to compute.
    """

    model: CellModel
    source: CellSource
    match: GeneMatch
    tokens: IntArray
    device: str = "auto"
    precision: Precision = "auto"

    def attention(self, rows: IntArray, block: int, *, by_head: bool = False) -> FloatArray:
        """Return the mean rank of the attention that each gene (rows) gets from each gene (columns), 0 to 1.

        ``(m, m)``, the mean over heads; with ``by_head`` ``(h, m, m)``. Ranks are those among the genes of a cell. NaN
        for genes that no cell expresses together.
        """
        layer = self.model.blocks[block]
        if not hasattr(getattr(layer, "attention", None), "weights"):
            raise ValueError(
                f"Expected a model whose attention weights can be read (scgpt, geneformer, scfoundation), got a "
                f"{self.model.family} model. Pass method='similarity' or method='perturb'."
            )
        m, n_heads = len(self.tokens), layer.attention.n_heads
        if by_head and n_heads * m * m > _MOST_SUMS:
            raise ValueError(
                f"Expected fewer genes for the choice of heads, got {m} genes and {n_heads} heads, whose sums do not "
                "fit into memory. Pass genes=, or leave select_heads out."
            )
        place = self._place()

        def forward(model: CellModel, batch: Batch) -> Tensor:
            x = model.inputs(batch)
            for one in model.blocks[:block] if block >= 0 else model.blocks[: len(model.blocks) + block]:
                x = one(x, batch)
            sums = torch.zeros(n_heads if by_head else 1, m, m)
            counts = torch.zeros(m, m)
            for of_cell, genes, expressed in zip(
                model.blocks[block].attention.weights(x, batch), batch.genes.split(list(batch.lengths)),
                model.is_expressed(batch).split(list(batch.lengths)), strict=True,
            ):  # fmt: skip
                at = place[genes.cpu()]
                read = ((at >= 0) & expressed.cpu()).nonzero()[:, 0]
                if len(read) < 2:
                    continue
                weight = of_cell[:, read][:, :, read].float().cpu()
                ranks = weight.argsort(2).argsort(2).float() / (len(read) - 1)
                ranks = (ranks if by_head else ranks.mean(0, keepdim=True)).transpose(1, 2)
                key = at[read]
                sums[:, key[:, None], key[None]] += ranks
                counts[key[:, None], key[None]] += 1
            return torch.cat([sums, counts[None]])

        total = self._total(rows, forward, (n_heads if by_head else 1) + 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = total[:-1] / total[-1]
        found[:, np.arange(m), np.arange(m)] = np.nan
        return found if by_head else found[0]

    def similarity(self, rows: IntArray | None) -> FloatArray:
        """Return the cosine similarity of gene embeddings, ``(m, m)``: input embeddings, or mean states in cells."""
        if rows is None:
            vectors = self.model.gene_table().detach().float().cpu()[torch.from_numpy(self.tokens).long()].numpy()
        else:
            vectors = self._mean_states(rows)
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(length > 0, length, 1)
        found = unit @ unit.T
        np.fill_diagonal(found, np.nan)
        return found

    def _mean_states(self, rows: IntArray) -> FloatArray:
        """Average the hidden states of each gene over the cells that express it, without what all genes share."""
        place, d = self._place(), self.model.config.d_model

        def forward(model: CellModel, batch: Batch) -> Tensor:
            kept = (model.is_expressed(batch).cpu() & (place[batch.genes.cpu()] >= 0)).nonzero()[:, 0]
            states = model.hidden(batch).float().cpu()[kept]
            at = place[batch.genes.cpu()[kept]]
            sums = torch.zeros(len(self.tokens), d + 1)
            return sums.index_add(0, at, torch.cat([states, torch.ones(len(states), 1)], dim=1))[None]

        total = self._total(rows, forward, 1)[0]
        means = np.divide(total[:, :-1], total[:, -1:], out=np.full((len(total), d), np.nan), where=total[:, -1:] > 0)
        return np.nan_to_num(means - np.nanmean(means, axis=0))

    def deletions(self, rows: IntArray) -> FloatArray:
        """Return the mean predicted change of each gene (columns) after the deletion of each (rows), ``(m, m)``.

        Changes are of the predicted value, from the whole cell where the family can predict any gene; otherwise of the
        logarithm of the predicted probability of the genes that the cell expresses.
        """
        edits = [Edit((int(token),), "delete") for token in self.tokens]
        m = len(self.tokens)

        def forward(model: CellModel, batch: Batch) -> Tensor:
            before = self._predictions(model, batch)
            sums = torch.zeros(2, m, m, device=before.device)
            for copies in edited_batches(model, batch, edits):
                change = self._predictions(model, copies.batch) - before[copies.cell]
                there = torch.isfinite(change)
                row = torch.from_numpy(copies.edit).to(before.device)
                sums[0].index_add_(0, row, change.nan_to_num())
                sums[1].index_add_(0, row, there.float())
            return sums

        total, n = self._total(rows, forward, 2)
        found = np.divide(total, n, out=np.full((m, m), np.nan), where=n > 0)
        np.fill_diagonal(found, np.nan)
        return found

    def _predictions(self, model: CellModel, batch: Batch) -> Tensor:
        """Predict the asked genes in each cell, ``(b, m)``; NaN where the model cannot."""
        genes = torch.from_numpy(self.tokens).long().to(batch.genes.device)
        if batch.values is not None and getattr(model, "cell_decoder", True) is not None:
            return model.reconstruct_genes(batch, genes).float()
        place = self._place().to(genes.device)
        at = (model.is_expressed(batch) & (place[batch.genes] >= 0)).nonzero()[:, 0]
        found = model.reconstruct(batch, at, hide=False).float()
        found = found.clamp(min=1e-12).log() if batch.values is None else found
        out = torch.full((batch.n_cells, len(genes)), torch.nan, device=genes.device)
        out[batch.cell[at], place[batch.genes[at]]] = found
        return out

    def _place(self) -> Tensor:
        """Position among the asked genes of each token of the vocabulary, -1 for others."""
        place = torch.full((len(self.model.vocab),), -1)
        place[torch.from_numpy(self.tokens).long()] = torch.arange(len(self.tokens))
        return place

    def _total(self, rows: IntArray, forward: Callable[[CellModel, Batch], Tensor], n: int) -> NDArray[np.float64]:
        """Add up what ``forward`` returns for parts of the cells, ``(n, ...)`` each."""
        total: FloatArray | float = 0.0
        for found in self._parts(rows, forward):
            # halves of a batch that did not fit into memory, and parts of several devices, are joined
            total = total + found.double().numpy().reshape(-1, n, *found.shape[1:]).sum(0)
        return np.asarray(total)

    def _parts(self, rows: IntArray, forward: Callable[[CellModel, Batch], Tensor]) -> Iterator[Tensor]:
        with details():
            for _, found in predict(
                self.model, self.source, self.match, forward, rows=rows, batch_size=_HELD, device=self.device,
                precision=self.precision, desc="linking genes in",
            ):  # fmt: skip
                yield found
