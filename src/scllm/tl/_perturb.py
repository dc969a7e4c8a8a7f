"""Perturb genes in silico, and measure how far a model moves cells."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats

from scllm import _keys, metrics
from scllm._checks import check_adata, groups, missing_key
from scllm._log import log, warn
from scllm._names import listed
from scllm._results import free_key, record, record_name
from scllm._typing import FloatArray, IntArray
from scllm._words import time_in_words
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.config import Precision
from scllm.engine.device import resolve_device, resolve_precision
from scllm.engine.estimate import expected_seconds, flops_per_cell, mean_tokens
from scllm.engine.in_silico import Edit, Mode
from scllm.models.base import Pooling
from scllm.tl._embed import check_choice
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve
from scllm.tl._perturb_run import CELL, GENE, N_SHIFTS, PerturbRun
from scllm.tl._perturbed_genes import (
    ALL,
    GeneLevels,
    combinations,
    gene_levels,
    matched_combinations,
    n_expressing,
)

__all__ = ["perturb"]


@closes_files
def perturb(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    genes: str | Sequence[str | Sequence[str]],
    mode: Mode = "delete",
    groupby: str | None = None,
    goal: str | Sequence[str] | None = None,
    n_null: int = 100,
    max_cells: int | None = None,
    pooling: Pooling | None = None,
    hidden_layer: int = -1,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    run_dir: str | PathLike[str] | None = None,
    random_state: int = 0,
    key_added: str = _keys.PERTURB,
    copy: bool = False,
) -> AnnData | None:
    """Perturb genes in the input of a model and measure how far the embeddings of cells and genes move.

    This asks a model, not a cell: the shift says what the model has learnt about a gene, which may come from
    co-expression alone. Each gene is therefore compared with other genes of similar expression, and the number of
    forward passes and the expected time are logged before anything starts. The perturbations are those of Geneformer
    (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9), for every family.

    Parameters
    ----------
    adata
        Cells by genes.
    model
        A model or its path. ``None``: the model last recorded on ``adata``.
    genes
        Names of genes, and lists of names for genes that are perturbed together; ``"all"``: every gene that a cell
        expresses, one at a time. Unknown names are left out with a warning.
    mode
        What happens to the genes:

        - ``"delete"``: the gene is taken out of the token sequence (or set to zero, for families that read zeros).
          Only cells that express all genes of the perturbation are changed.
        - ``"overexpress"``: the gene becomes the first of the sequence, or gets the highest value of the cell. It is
          inserted into cells that do not express it.
        - a number from -1 to 1: the gene moves by this share of the cell's genes in the order of expression; 0.25
          activates it by a quarter of them, -0.25 inhibits it.
    groupby
        Column of ``obs`` with groups (or, with ``goal``, states) of cells. Results are given for each group.
    goal
        State of ``groupby`` that perturbed cells are to move to, or several: ``(start, goal, *alternatives)``. With one
        name, cells of all other states are perturbed. A state is represented by the mean embedding of its cells. The
        shift is the cosine similarity to the state after the perturbation, minus that before.
    n_null
        Number of other genes with similar expression that are perturbed too, as the null distribution, but at least 20
        for each perturbation (0: none). With ``genes="all"`` every gene is compared with the others, and none is added.
    max_cells
        Perturb a random subset of so many cells. ``None``: all cells.
    pooling, hidden_layer
        Which cell embedding is compared, as in :func:`embed`.
    layer
        Layer to read. ``None``: ``X``.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: as in :func:`embed`.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: as in :func:`embed`.
    batch_size
        Number of original cells that are held at a time (16); changes only speed and memory.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    precision
        ``"auto"``: fp32 on a CPU, bf16 on a GPU that supports it.
    run_dir
        Directory in which progress is saved after each batch of cells. The same call resumes there after an
        interruption. ``None``: progress is not saved.
    random_state
        Seed for the subset of cells.
    key_added
        Key of the results.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.uns["scllm"][key_added]``
        ``params`` and ``table``, one row for each perturbation, group and state:

        - ``perturbation``, ``group``, ``state`` (with ``goal``), ``is_null`` (added as null distribution).
        - ``n_cells`` (perturbed cells), ``expression`` (mean share of a cell's total, as ``log1p`` per 10,000;
          meant for counts).
        - ``cell_shift``, ``gene_shift``: one minus the cosine similarity of the cell embedding, and of the embeddings
          of the other genes, before and after. Means over cells.
        - ``goal_shift``, ``low``, ``high`` (with ``goal``): mean shift towards the state, and its 95 % interval over
          cells.
        - ``null_median``, ``null_scale``, ``z``, ``p_value``, ``q_value``: comparison of the shift (towards the state,
          two-sided; without ``goal`` of the cell, one-sided) with genes of similar expression
          (:func:`scllm.metrics.matched_null_test`); ``q_value`` is adjusted by Benjamini and Hochberg.
        - ``rank``: place among all perturbations of this group and state, largest shift first.
    ``adata.obsm["X_scllm_" + key_added]``
        Embedding of each cell after the perturbation with the best rank in any group and state, float32
        ``(n_cells, d)``, and with the suffix ``_before`` that before it. Cells that the perturbation does not change
        keep their embedding.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=20, n_genes=30)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.perturb(adata, model, genes=["gene0", ("gene1", "gene2")], n_null=10)
    >>> adata.obsm["X_scllm_perturb"].shape
    (20, 64)
    """
    check_adata(adata, copy, key_added)
    key = free_key(adata, "obsm", _keys.PERTURBED + key_added)
    _check_mode(mode, n_null)
    chosen = resolve(model, adata)
    check_choice(chosen, pooling, hidden_layer)
    source = open_source(adata, layer=layer)
    check_layer(source, chosen, layer, adata)
    match = gene_match(adata, source, chosen, gene_key, min_coverage)
    states = _states(adata, groupby, goal)
    rows = _some(states.perturbed, max_cells, random_state)
    levels = gene_levels(source, match, rows)
    asked = combinations(genes, source, match, chosen, levels, insert=mode == "overexpress")
    if mode != "overexpress":
        asked = _expressed(asked, n_expressing(asked.values(), source, match, rows), mode)
    nulls = {} if _is_all(genes) else matched_combinations(asked, levels, n_null, max(1, len(rows) // 100))
    edits = [Edit(tokens, mode) for tokens in (*asked.values(), *nulls.values())]
    run = PerturbRun(chosen, source, match, pooling, hidden_layer, batch_size, device, precision)
    _log_cost(run, rows, levels, edits, len(asked))
    before = run.embedded()
    sums = run.responses(edits, rows, states.group, len(states.groups), states.centers(before), run_dir)
    table = _table(sums, asked, nulls, states, levels)
    if n_null or _is_all(genes):
        _warn_of_few_nulls(table)
    shown = _strongest(table)
    after = run.changed(Edit(asked[shown], mode), before)

    adata = adata.copy() if copy else adata
    adata.obsm[key], adata.obsm[key + _keys.UNPERTURBED] = after, before
    record_name(adata, "obsm", _keys.PERTURBED + key_added)
    params = {"mode": mode, "groupby": groupby, "goal": goal, "n_null": len(nulls), "n_cells": len(rows)}
    params |= {"pooling": pooling or chosen.pooling, "hidden_layer": hidden_layer, "layer": layer}
    params |= {"random_state": random_state, "key_added": key, "shown": shown}
    record(adata, _keys.safe(key_added), params, table)
    remember(adata, chosen)
    return adata if copy else None


def _is_all(genes: object) -> bool:
    return isinstance(genes, str) and genes == ALL


def _check_mode(mode: Mode, n_null: int) -> None:
    """Raise on a mode that is unknown."""
    is_degree = isinstance(mode, (int, float)) and not isinstance(mode, bool)
    if mode not in ("delete", "overexpress") and not (is_degree and -1 <= mode <= 1 and mode != 0):
        raise ValueError(
            f"Expected mode to be 'delete', 'overexpress' or a number from -1 to 1 other than 0, got {mode!r}. 0.25 "
            "moves a gene up by a quarter of the cell's genes."
        )
    if n_null < 0:
        raise ValueError(f"Expected n_null of at least 0, got {n_null}. Pass 0 for no null distribution.")


@dataclass(frozen=True)
class _States:
    """Cells by group, which of them are perturbed, and the states that they may move to."""

    groups: list[str]
    group: IntArray
    perturbed: IntArray
    targets: list[str]
    members: list[IntArray]

    def centers(self, embedding: FloatArray) -> FloatArray:
        """Return the mean embedding of each state, ``(s, d)``."""
        means = [embedding[cells].mean(0) for cells in self.members]
        return np.array(means, np.float32).reshape(len(means), embedding.shape[1])


def _states(adata: AnnData, groupby: str | None, goal: str | Sequence[str] | None) -> _States:
    """Read groups and states; raise if there is no such column or state."""
    everything = np.arange(adata.n_obs)
    if groupby is None:
        if goal is not None:
            raise TypeError(f"goal={goal!r} names states, but groupby is None. Pass the column of obs that holds them.")
        if not adata.n_obs:
            raise ValueError("Expected at least one cell in adata, got 0 cells. Check earlier filters.")
        return _States(["all"], np.zeros(adata.n_obs, np.int64), everything, [], [])
    column = groups(adata.obs, groupby)
    names, codes = list(column.cat.categories), column.cat.codes.to_numpy().astype(np.int64)
    if goal is None:
        return _States(names, codes, np.flatnonzero(codes >= 0), [], [])
    asked = [goal] if isinstance(goal, str) else [str(name) for name in goal]
    for name in asked:
        if name not in names:
            raise missing_key(name, names, f"a state in adata.obs[{groupby!r}]")
    if len(set(asked)) < len(asked) or not asked:
        raise ValueError(f"Expected different states in goal, got {asked}. Pass (start, goal, *alternatives).")
    start, targets = (asked[0], asked[1:]) if len(asked) > 1 else (None, asked)
    wanted = [start] if start is not None else [name for name in names if name != targets[0]]
    if not wanted:
        raise ValueError(
            f"Expected cells in another state than {targets[0]!r} to perturb, but obs[{groupby!r}] holds no other. "
            "Add cells of the start state."
        )
    perturbed = np.flatnonzero(np.isin(codes, [names.index(name) for name in wanted]))
    members = [np.flatnonzero(codes == names.index(name)) for name in targets]
    renumbered = np.full(adata.n_obs, -1)
    for number, name in enumerate(wanted):
        renumbered[codes == names.index(name)] = number
    return _States(wanted, renumbered, perturbed, targets, members)


def _some(rows: IntArray, max_cells: int | None, seed: int) -> IntArray:
    """Draw a random subset of cells."""
    if max_cells is not None and max_cells < 1:
        raise ValueError(f"Expected max_cells of at least 1, got {max_cells}. Leave it out for all cells.")
    if max_cells is None or len(rows) <= max_cells:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))


def _expressed(asked: dict[str, tuple[int, ...]], n_cells: IntArray, mode: Mode) -> dict[str, tuple[int, ...]]:
    """Leave out genes and combinations that no cell expresses, which can be neither deleted nor moved."""
    lost = [name for name, n in zip(asked, n_cells, strict=True) if not n]
    if len(lost) == len(asked):
        raise ValueError(
            f"Expected genes that the cells express with mode={mode!r}, but no cell expresses {lost[0]!r}. Pass other "
            "genes, or mode='overexpress', which inserts them."
        )
    if lost:
        warn(f"No cell expresses {listed(lost)}, which are left out. Pass mode='overexpress' to insert them.")
    return {name: tokens for name, tokens in asked.items() if name not in lost}


def _log_cost(run: PerturbRun, rows: IntArray, levels: GeneLevels, edits: Sequence[Edit], n_asked: int) -> None:
    """Say how many forward passes there will be, and how long they take."""
    if not log.isEnabledFor(logging.INFO):
        return
    n_of = dict(zip(levels.tokens.tolist(), levels.n_cells.tolist(), strict=True))
    always = bool(edits) and edits[0].mode == "overexpress"
    n_passes = sum(len(rows) if always else min(n_of.get(token, 0) for token in edit.tokens) for edit in edits)
    device = resolve_device(run.device)
    n_tokens = mean_tokens(run.model, run.source, run.match, rows)
    flops = n_passes * flops_per_cell(run.model, n_tokens, training=False)
    seconds = expected_seconds(flops, n_passes, device, resolve_precision(run.precision, device))
    log.info(
        "perturbing %s in %s cells, and %s others as null distribution: up to %s forward passes of %.0f tokens, %s; "
        "fewer genes=, n_null= or max_cells= take less",
        f"{n_asked:,} genes or combinations",
        f"{len(rows):,}",
        f"{len(edits) - n_asked:,}",
        f"{n_passes:,}",
        n_tokens,
        time_in_words(seconds),
    )


def _table(
    sums: FloatArray,
    asked: Mapping[str, tuple[int, ...]],
    nulls: Mapping[str, tuple[int, ...]],
    states: _States,
    levels: GeneLevels,
) -> pd.DataFrame:
    """Make the table: means of each perturbation in each group, compared with those of other genes."""
    names, tokens = [*asked, *nulls], [*asked.values(), *nulls.values()]
    n, total, squares = sums[:, :, 0], sums[:, :, 1], sums[:, :, 2]
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n
        spread = np.sqrt(np.maximum(squares / n - mean**2, 0) / np.maximum(n - 1, 1))
    half = spread * stats.t.ppf(0.975, np.maximum(n - 1, 1))
    is_null = np.repeat([False, True], [len(asked), len(nulls)])
    common = {
        "perturbation": names,
        "is_null": is_null,
        "expression": [levels.level(of) for of in tokens],
    }
    parts = []
    for group, name in enumerate(states.groups):
        shifts = {"cell_shift": mean[:, group, CELL], "gene_shift": mean[:, group, GENE]}
        base = pd.DataFrame({**common, "group": name, "n_cells": n[:, group, CELL].astype(int), **shifts})
        for number, state in enumerate(states.targets):
            at = N_SHIFTS + number
            ends = {"low": mean[:, group, at] - half[:, group, at], "high": mean[:, group, at] + half[:, group, at]}
            parts.append(_tested(base.assign(state=state, goal_shift=mean[:, group, at], **ends), tokens))
        if not states.targets:
            parts.append(_tested(base, tokens))
    return pd.concat(parts, ignore_index=True)


def _tested(table: pd.DataFrame, tokens: Sequence[tuple[int, ...]]) -> pd.DataFrame:
    """Compare each row with null rows of similar expression, and rank all rows."""
    has_goal = "goal_shift" in table
    statistic = table["goal_shift" if has_goal else "cell_shift"]
    is_null = table["is_null"].to_numpy()
    tests = metrics.matched_null_test(
        statistic.to_numpy(),
        table["expression"].to_numpy(),
        is_null if is_null.any() else None,
        alternative="two-sided" if has_goal else "greater",
        kinds=[len(of) for of in tokens],
    )
    return table.join(tests).assign(rank=statistic.rank(ascending=False, method="min"))


def _warn_of_few_nulls(table: pd.DataFrame) -> None:
    """Warn if perturbations could not be compared with others."""
    lacking = table.loc[~table["is_null"] & table["p_value"].isna() & (table["n_cells"] > 0), "perturbation"].unique()
    if len(lacking):
        warn(
            f"{listed(lacking)} cannot be compared with other genes, because fewer than "
            f"{metrics.FEWEST_NULLS + 1} of similar expression were perturbed; their p-values are missing. Pass a "
            "larger n_null, or genes='all'."
        )


def _strongest(table: pd.DataFrame) -> str:
    """Return the perturbation that was asked for with the best rank in any group and state."""
    asked = table[~table["is_null"] & table["rank"].notna()]
    return str(asked.loc[asked["rank"].idxmin(), "perturbation"])
