"""Dividing cells into parts, by cell or by whole groups."""

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
    """Which part each cell belongs to, ``(n_cells,)``: an index into ``fractions``.

    Parameters
    ----------
    n_cells
        Number of cells.
    fractions
        Share of each part; they add up to one.
    groups
        Cells of one group stay together; shares are met as closely as whole groups allow.
    stratify
        Every label is divided by the same shares, and the first part has a cell of each where another label can give
        one in exchange; missing labels count as one more.
    random_state
        Seed.
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
        # what rounding took from one label is given to the next: parts have their size even where all labels are rare
        exact = np.cumsum(fractions)[:-1] * len(cells) + rounded
        # what is carried differs between edges: of rare labels a later one could fall before an earlier one
        edges = np.maximum.accumulate(np.clip(np.rint(exact), 0, len(cells)).astype(int))
        rounded = exact - edges
        for number, chosen in enumerate(np.split(rng.permutation(cells), edges)):
            part[chosen] = number
    _keep_in_first(part, codes, rng)
    return part


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise unless there are two or three positive shares that add up to one."""
    shares = np.atleast_1d(fractions)
    if len(shares) not in (2, 3) or min(shares) <= 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(
            "Expected fractions to be two or three positive numbers that add up to 1 (train, validation and test), "
            f"got {fractions}. Pass for example fractions=(0.8, 0.1, 0.1)."
        )


def _keep_in_first(part: IntArray, codes: IntArray, rng: np.random.Generator) -> None:
    """Swap cells until the first part, which is trained on, has every label; parts keep their sizes."""
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
    # largest first, each to the part that lacks most; equal sizes in random order
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
