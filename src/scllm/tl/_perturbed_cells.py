"""Cells of a perturbation screen: which were perturbed how, and what changed in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from scllm._checks import groups, missing_key
from scllm._log import DataWarning, warn
from scllm._names import listed
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.metrics import MeasuredChange

__all__ = ["Screen", "changes", "half_changes", "log_normalised", "read_screen"]

JOIN = "+"
# a part of a combination that stands for "no second gene", as in "STAT1+ctrl"
_NONE = ("ctrl", "control")
_FEWEST = 4


@dataclass(frozen=True)
class Screen:
    """Perturbed and control cells.

    Parameters
    ----------
    key, control
        Column of ``obs``, and its label of control cells.
    names
        Perturbations, ``(p,)``.
    code
        Perturbation of each cell, ``(n_obs,)``; -1 for control cells, -2 for cells without a label.
    batch
        Batch of each cell, ``(n_obs,)``.
    genes
        Names of the genes of each perturbation.
    """

    key: str
    control: str
    names: list[str]
    code: IntArray
    batch: IntArray
    genes: list[tuple[str, ...]]

    def cells(self, perturbation: int) -> IntArray:
        """Return the rows of the cells of a perturbation, -1 for those of control cells."""
        return np.flatnonzero(self.code == perturbation)


def read_screen(adata: AnnData, key: str, control: str, batch_key: str | None) -> Screen:
    """Read the columns of a screen; raise without control cells or with fewer than two perturbations."""
    column = groups(adata.obs, key)
    labels = list(column.cat.categories)
    if control not in labels:
        raise missing_key(control, labels, f"a label in adata.obs[{key!r}]", "Pass the label of control cells.")
    names = [name for name in labels if name != control]
    if len(names) < 2:
        raise ValueError(
            f"Expected at least 2 perturbations beside {control!r} in obs[{key!r}], got {len(names)} "
            f"({listed(names)}): one is needed for training and one to be held out. Add cells of others."
        )
    number = {name: i for i, name in enumerate(names)} | {control: -1}
    code = np.array([number[label] for label in labels] + [-2])[column.cat.codes.to_numpy()]
    batch = np.zeros(adata.n_obs, np.int64)
    if batch_key is not None:
        of_batch = groups(adata.obs, batch_key)
        batch = of_batch.cat.codes.to_numpy().astype(np.int64)
        code = np.where(batch < 0, -2, code)
        code = _with_controls(code, batch, list(of_batch.cat.categories), batch_key)
    if (code == -2).any():
        warn(f"{int((code == -2).sum())} of {len(code)} cells have no label or batch and are not used.", DataWarning)
    few = [name for i, name in enumerate(names) if (code == i).sum() < _FEWEST]
    if few:
        warn(
            f"{listed(few)} have fewer than {_FEWEST} cells and are not used. Merge their guides, or drop them.",
            DataWarning,
        )
    return _without(Screen(key, control, names, code, batch, [_parts(name, control) for name in names]), few)


def _with_controls(code: IntArray, batch: IntArray, batches: list[str], batch_key: str) -> IntArray:
    """Leave out cells of batches without control cells."""
    lacking = [i for i in range(len(batches)) if not ((code == -1) & (batch == i)).any()]
    if len(lacking) == len(batches):
        raise ValueError(f"Expected control cells with a batch in obs[{batch_key!r}], got none. Pass batch_key=None.")
    lost = np.isin(batch, lacking) & (code >= 0)
    if lost.any():
        warn(
            f"{int(lost.sum())} perturbed cells are of batches without control cells "
            f"({listed(batches[i] for i in lacking)}) and are not used.",
            DataWarning,
        )
    return np.where(lost, -2, code)


def _without(screen: Screen, few: Sequence[str]) -> Screen:
    """Remove perturbations with too few cells."""
    kept = [i for i, name in enumerate(screen.names) if name not in set(few)]
    if len(kept) < 2:
        raise ValueError(
            f"Expected at least 2 perturbations with {_FEWEST} cells each in obs[{screen.key!r}], got {len(kept)}. Add "
            "cells."
        )
    new = np.full(len(screen.names) + 2, -2)
    new[kept] = np.arange(len(kept))
    new[-1] = -1
    code = new[np.where(screen.code == -2, len(screen.names), screen.code)]
    return Screen(
        screen.key, screen.control, [screen.names[i] for i in kept], code, screen.batch,
        [screen.genes[i] for i in kept],
    )  # fmt: skip


def _parts(name: str, control: str) -> tuple[str, ...]:
    """Return the genes of a perturbation: ``"A+B"`` has two, ``"A+ctrl"`` one."""
    parts = tuple(part for part in name.split(JOIN) if part not in (control, *_NONE))
    return parts or (name,)


def log_normalised(source: CellSource, match: GeneMatch, rows: IntArray, target_sum: float = 1e4) -> CSR:
    """Return ``log1p`` of counts per ``target_sum`` of the matched genes, cells by genes in the order of tokens."""
    tokens = match.tokens(source.read(rows), rows)
    values = np.asarray(tokens.values, np.float64)
    cell = np.repeat(np.arange(len(tokens)), tokens.lengths)
    totals = np.bincount(cell, weights=values, minlength=len(tokens))
    data = np.log1p(values * (target_sum / totals[cell])).astype(np.float32)
    columns = np.searchsorted(match.measured, tokens.genes)
    return sparse.csr_matrix((data, columns, tokens.indptr), shape=(len(rows), len(match.measured)))


def changes(x: CSR, screen: Screen, perturbations: Sequence[int]) -> MeasuredChange:
    """Measure the change after each perturbation against control cells of the same batches.

    ``x`` holds all cells; each perturbed cell is compared with the mean of the control cells of its batch.
    """
    control = _moments(x, np.where(screen.code == -1, screen.batch, -1), screen.batch.max() + 1)
    of_cell = {p: screen.cells(p) for p in perturbations}
    return _compared(x, of_cell, screen.batch, control)


def half_changes(
    x: CSR, screen: Screen, perturbations: Sequence[int], seed: int
) -> tuple[MeasuredChange, MeasuredChange]:
    """Measure the changes in two random halves of the cells, each against its own half of the control cells."""
    rng = np.random.default_rng(seed)
    in_second = np.zeros(len(screen.code), bool)
    strata = [screen.cells(p) for p in perturbations]
    strata += [np.flatnonzero((screen.code == -1) & (screen.batch == b)) for b in np.unique(screen.batch)]
    for cells in strata:
        order = rng.permutation(cells)
        in_second[order[: len(order) // 2]] = True
    found = []
    for is_in in (~in_second, in_second):
        control = _moments(x, np.where((screen.code == -1) & is_in, screen.batch, -1), screen.batch.max() + 1)
        of_cell = {p: (cells := screen.cells(p))[is_in[cells]] for p in perturbations}
        found.append(_compared(x, of_cell, screen.batch, control))
    return found[0], found[1]


@dataclass(frozen=True)
class _Moments:
    """Number of cells, mean and variance of each group, ``(groups,)`` and ``(groups, g)``."""

    n: FloatArray
    mean: FloatArray
    variance: FloatArray


def _moments(x: CSR, group: IntArray, n_groups: int) -> _Moments:
    cells = np.flatnonzero(group >= 0)
    member = sparse.csr_matrix((np.ones(len(cells)), (group[cells], cells)), shape=(n_groups, x.shape[0]))
    n = np.asarray(member.sum(1)).ravel()
    some = np.maximum(n, 1)[:, None]
    mean = _dense(member @ x) / some
    variance = (_dense(member @ x.multiply(x)) / some - mean**2) * some / np.maximum(some - 1, 1)
    return _Moments(n, mean, np.maximum(variance, 0))


def _dense(sums: CSR) -> NDArray[np.float64]:
    """Sums of groups of cells by genes; there are few groups."""
    out = np.zeros(sums.shape)
    sums = sums.tocoo()
    out[sums.row, sums.col] = sums.data
    return out


def _compared(x: CSR, of_cell: dict[int, IntArray], batch: IntArray, control: _Moments) -> MeasuredChange:
    """Compare cells of perturbations with control cells, weighted by the batches of the perturbed cells."""
    group = np.full(x.shape[0], -1)
    for place, cells in enumerate(of_cell.values()):
        group[cells] = place
    treated = _moments(x, group, len(of_cell))
    weight = np.zeros((len(of_cell), len(control.n)))
    for place, cells in enumerate(of_cell.values()):
        # an empty half of the controls of a batch is replaced by the others
        usable = np.bincount(batch[cells], minlength=len(control.n)) * (control.n > 0)
        weight[place] = usable / max(usable.sum(), 1) if usable.any() else control.n / control.n.sum()
    expected = weight @ control.mean
    of_control = (weight**2 / np.maximum(control.n, 1)) @ control.variance
    n = np.maximum(treated.n, 1)[:, None]
    of_treated = treated.variance / n
    change = treated.mean - expected
    total = of_treated + of_control
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(total > 0, change / np.sqrt(total), np.nan)
        n_control = np.maximum(control.n.sum() - 1, 1)
        degrees = total**2 / (of_treated**2 / np.maximum(n - 1, 1) + of_control**2 / n_control)
    return MeasuredChange(change, t, np.where(np.isfinite(degrees) & (degrees > 0), degrees, 1.0))
