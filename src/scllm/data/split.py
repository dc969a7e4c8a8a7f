"""Splitting cells into train, validation and test, by cell or by group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from scllm._typing import IntArray

__all__ = ["PARTS", "split_cells"]

PARTS = ("train", "validation", "test")


def split_cells(
    n_cells: int,
    fractions: Sequence[float],
    *,
    groups: pd.Series | None = None,
    stratify: pd.Series | None = None,
    random_state: int = 0,
) -> IntArray:
    """Assign each cell to a part of the split, ``(n_cells,)``: an index into ``fractions``.

    Parameters
    ----------
    n_cells
        Number of cells.
    fractions
        Fraction of cells in each part; they add up to one.
    groups
        Group of each cell. The cells of a group stay in the same part; fractions are met as closely as that allows.
    stratify
        Label of each cell. Every label is split by the same fractions. The first part gets at least one cell of every
        label, as long as another label can give up a cell in exchange. Missing labels count as one more label.
    random_state
        Random seed.
    """
    check_fractions(fractions)
    rng = np.random.default_rng(random_state)
    if groups is not None:
        return _by_group(groups, fractions, rng)
    part = np.empty(n_cells, np.int64)
    codes = np.zeros(n_cells, np.int64)
    if stratify is not None:
        codes = pd.factorize(stratify, use_na_sentinel=False)[0]
    strata = [np.flatnonzero(codes == code) for code in range(codes.max(initial=-1) + 1)]
    rounded = np.zeros(len(fractions) - 1)
    for cells in strata:
        # rounding errors are carried over to the next label, so that parts have their size even if all labels are rare
        exact = np.cumsum(fractions)[:-1] * len(cells) + rounded
        # the carried errors differ between edges, so for a rare label a later edge could come before an earlier one
        edges = np.maximum.accumulate(np.clip(np.rint(exact), 0, len(cells)).astype(int))
        rounded = exact - edges
        for number, chosen in enumerate(np.split(rng.permutation(cells), edges)):
            part[chosen] = number
    _keep_in_first(part, codes, rng)
    return part


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ``ValueError`` unless there are two or three positive fractions that add up to one."""
    shares = np.atleast_1d(fractions)
    if len(shares) not in (2, 3) or min(shares) <= 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(
            "Expected fractions to be two or three positive numbers that add up to 1 (train, validation and test), "
            f"got {fractions}. Pass for example fractions=(0.8, 0.1, 0.1)."
        )


def _keep_in_first(part: IntArray, codes: IntArray, rng: np.random.Generator) -> None:
    """Swap cells until the first part, the training cells, has every label; the sizes of parts do not change."""
    counts = np.bincount(codes[part == 0], minlength=codes.max(initial=-1) + 1)
    for lacking in np.flatnonzero(counts == 0):
        giving = counts.argmax()
        if counts[giving] < 2:
            return
        kept = rng.choice(np.flatnonzero(codes == lacking))
        given = rng.choice(np.flatnonzero((codes == giving) & (part == 0)))
        part[given], part[kept] = part[kept], 0
        counts[giving] -= 1
        counts[lacking] += 1


def _by_group(groups: pd.Series, fractions: Sequence[float], rng: np.random.Generator) -> IntArray:
    codes, names = pd.factorize(groups, use_na_sentinel=False)
    if len(names) < len(fractions):
        raise ValueError(
            f"Expected at least {len(fractions)} groups in {groups.name!r}, one for each fraction, got {len(names)}: "
            "a group is never divided. Pass another group_key, or split by cell."
        )
    sizes = np.bincount(codes)
    part_of = np.empty(len(names), np.int64)
    missing = np.array(fractions) * len(codes)
    # the largest group first, each to the part that is furthest below its size; groups of equal size in random order
    order = np.lexsort((rng.permutation(len(names)), -sizes))
    used: set[int] = set()
    for place, group in enumerate(order):
        empty = [number for number in range(len(fractions)) if number not in used]
        # no part may stay empty
        open_to = empty if len(empty) == len(order) - place else range(len(fractions))
        chosen = max(open_to, key=lambda number: missing[number])
        part_of[group] = chosen
        used.add(chosen)
        missing[chosen] -= sizes[group]
    return part_of[codes]
