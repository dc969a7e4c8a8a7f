"""Forward passes on perturbed cells, and the sums of what they change, which can be resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from scllm._log import details, log
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.fingerprint import fingerprint, hash_match
from scllm.data.genes import GeneMatch
from scllm.data.replace import replaced_when_whole
from scllm.engine.config import Precision
from scllm.engine.in_silico import Edit, Edited, edited_batches
from scllm.engine.predict import predict
from scllm.models.base import Batch, CellModel, Pooling

__all__ = ["CELL", "GENE", "N_SHIFTS", "PerturbRun"]

# columns of the sums: shift of the cell and of its genes; then the shift towards each state
CELL, GENE, N_SHIFTS = 0, 1, 2

# original cells that are held at a time, with the hidden states of all their tokens
_HELD = 16
_PROGRESS = "perturb.npz"
_ROW = "row"


@dataclass(frozen=True)
class PerturbRun:
    """A model that reads perturbed cells.

    Parameters
    ----------
    model, source, match
        The model, the cells, and the token of each of their genes.
    pooling, hidden_layer
        The cell embedding that is compared.
    batch_size
        Number of original cells held at a time.
    device, precision
        Where and how to compute.
    """

    model: CellModel
    source: CellSource
    match: GeneMatch
    pooling: Pooling | None = None
    hidden_layer: int = -1
    batch_size: int | None = None
    device: str = "auto"
    precision: Precision = "auto"

    def embedded(self) -> FloatArray:
        """Embed all cells as they are, ``(n_cells, d)``."""

        def forward(replica: CellModel, batch: Batch) -> Tensor:
            return replica.embed(batch, pooling=self.pooling, layer=self.hidden_layer)

        parts = self._predicted(np.arange(self.source.n_obs), forward, "embedding unperturbed", held=None)
        return torch.cat([part for _, part in parts]).numpy()

    def changed(self, edit: Edit, before: FloatArray) -> FloatArray:
        """Embed all cells after an edit; cells that it does not change keep their embedding."""
        found = before.copy()

        def forward(replica: CellModel, batch: Batch) -> Tensor:
            embedding = torch.full((batch.n_cells, before.shape[1]), torch.nan, device=batch.genes.device)
            for copies in edited_batches(replica, batch, [edit]):
                embedding[copies.cell] = replica.embed(
                    copies.batch, pooling=self.pooling, layer=self.hidden_layer
                ).float()
            return embedding

        for rows, part in self._predicted(np.arange(self.source.n_obs), forward, "embedding perturbed", held=None):
            is_changed = ~torch.isnan(part[:, 0]).numpy()
            found[rows][is_changed] = part.numpy()[is_changed]
        return found

    def responses(
        self,
        edits: Sequence[Edit],
        rows: IntArray,
        group: IntArray,
        n_groups: int,
        centers: FloatArray,
        run_dir: str | PathLike[str] | None = None,
    ) -> FloatArray:
        """Sum what edits change in the cells of each group.

        Parameters
        ----------
        edits
            The perturbations.
        rows
            The cells.
        group
            Group of all cells of the source, ``(n_obs,)``.
        n_groups
            Number of groups.
        centers
            Embeddings of states that cells may move to, ``(s, d)``.
        run_dir
            Directory in which the sums so far are saved after each batch, and found again.

        Returns
        -------
        Numbers of cells, sums and sums of squares, ``(e, n_groups, 3, 2 + s)``: of the shift of the cell, the mean
        shift of its other genes, and the shift towards each state.
        """
        shape = (len(edits), n_groups, 3, 2 + len(centers))
        said = [self.model.hash(), fingerprint(self.source), hash_match(self.match), list(edits), self.pooling]
        said += [self.hidden_layer, rows.tolist(), group.tolist(), np.round(centers, 4).tolist()]
        progress = _Progress.at(run_dir, shape, said)
        targets = torch.from_numpy(np.asarray(centers, np.float32))

        def forward(replica: CellModel, batch: Batch) -> Tensor:
            return self._shifts(replica, batch, edits, targets.to(batch.genes.device))

        for part, found in self._predicted(rows[progress.n_done :], forward, "perturbing", held=_HELD):
            edit, row = found[:, :2].long().numpy().T
            progress.add(edit, group[row], found[:, 2:].double().numpy(), n_cells=part.stop - part.start)
        return progress.sums

    def _shifts(self, model: CellModel, batch: Batch, edits: Sequence[Edit], targets: Tensor) -> Tensor:
        """Compute edit, row, shift of the cell, of its genes, and towards each state for each copy of a cell."""
        hidden = model.hidden(batch, layer=self.hidden_layer).float()
        cell = self._pooled(model, hidden, batch)
        targets = normalize(targets, dim=1)
        found = [hidden.new_zeros(0, 4 + len(targets))]
        for copies in edited_batches(model, batch, edits):
            states = model.hidden(copies.batch, layer=self.hidden_layer).float()
            moved = self._pooled(model, states, copies.batch)
            towards = (moved - cell[copies.cell]) @ targets.T
            index = torch.from_numpy(copies.edit).to(hidden)
            row = batch.obs[_ROW][copies.cell].to(hidden)
            shift = _shift(moved, cell[copies.cell])
            of_genes = _gene_shift(model, copies, states, hidden)
            found.append(torch.cat([torch.stack([index, row, shift, of_genes], dim=1), towards], dim=1))
        return torch.cat(found)

    def _pooled(self, model: CellModel, hidden: Tensor, batch: Batch) -> Tensor:
        return normalize(model.pool(hidden, batch, self.pooling or model.pooling).float(), dim=1)

    def _predicted(
        self, rows: IntArray, forward: Callable[[CellModel, Batch], Tensor], desc: str, *, held: int | None
    ) -> Iterator[tuple[slice, Tensor]]:
        if not len(rows):
            return
        size = None if held is None else self.batch_size or held
        with details():  # the verb has said what it does and how long that takes
            yield from predict(
                self.model, self.source, self.match, forward, rows=rows, batch_size=size, device=self.device,
                precision=self.precision, desc=desc, obs={_ROW: np.arange(self.source.n_obs)},
            )  # fmt: skip


def _shift(moved: Tensor, original: Tensor) -> Tensor:
    """Compute one minus the cosine similarity of vectors of unit length, also where that rounds to zero."""
    return (moved - original).square().sum(1) / 2


def _gene_shift(model: CellModel, copies: Edited, states: Tensor, hidden: Tensor) -> Tensor:
    """Compute the mean of one minus the cosine similarity of each cell's other genes, ``(n,)``; NaN without any."""
    kept = ((copies.origin >= 0) & ~model.is_special[copies.batch.genes]).nonzero()[:, 0]
    shift = _shift(normalize(states[kept], dim=1), normalize(hidden[copies.origin[kept]], dim=1))
    n = len(copies.cell)
    of = copies.batch.cell[kept]
    return shift.new_zeros(n).index_add(0, of, shift) / torch.bincount(of, minlength=n)


@dataclass
class _Progress:
    """Sums so far, and the number of cells in them."""

    sums: FloatArray
    n_done: int = 0
    path: Path | None = None
    digest: str = ""

    @classmethod
    def at(cls, run_dir: str | PathLike[str] | None, shape: tuple[int, ...], said: Sequence[Any]) -> _Progress:
        """Find the sums of an earlier call that was interrupted, or begin with zeros."""
        if run_dir is None:
            return cls(np.zeros(shape))
        path = Path(fspath(run_dir)) / _PROGRESS
        digest = hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return cls(np.zeros(shape), path=path, digest=digest)
        with np.load(path, allow_pickle=False) as saved:
            if str(saved["digest"]) != digest:
                raise ValueError(
                    f"Expected the results of the same perturbations, cells and model in {path.parent}, got those of "
                    "another call. Pass another run_dir."
                )
            found = cls(saved["sums"], int(saved["n_done"]), path, digest)
        log.info("resuming after %d perturbed cells in %s", found.n_done, path.parent)
        return found

    def add(self, edit: IntArray, group: IntArray, values: FloatArray, *, n_cells: int) -> None:
        """Add the values of some cells, ``(n, k)``."""
        there = np.isfinite(values)
        values = np.where(there, values, 0.0)
        for place, power in enumerate((there, values, values**2)):
            np.add.at(self.sums[:, :, place], (edit, group), power)
        self.n_done += n_cells
        if self.path is not None:
            with replaced_when_whole(self.path) as fresh, fresh.open("wb") as handle:
                np.savez(handle, sums=self.sums, n_done=self.n_done, digest=self.digest)
