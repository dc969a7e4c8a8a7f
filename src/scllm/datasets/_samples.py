"""Drawing whole samples at random."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scllm._typing import IntArray

__all__ = ["draw_samples", "samples_of"]


def samples_of(cells: pd.DataFrame, columns: list[str]) -> tuple[pd.DataFrame, IntArray]:
    """Find the samples, which are the combinations of ``columns`` that occur.

    Returns a table with a row per sample and its ``n_cells``, and the sample of each cell, ``(n_cells,)``. Samples are
    numbered in the order of their first cell. Cells without a value in a column are a sample too.
    """
    grouped = cells.groupby(columns, observed=True, dropna=False, sort=False)
    return grouped.size().rename("n_cells").reset_index(), grouped.ngroup().to_numpy()


def draw_samples(n_cells_each: IntArray, n_cells: int | None, random_state: int) -> NDArray[np.bool_]:
    """Draw whole samples at random up to at most ``n_cells``; a sample that no longer fits is skipped.

    Returns
    -------
    Which samples are drawn, ``(n_samples,)``.

    Examples
    --------
    >>> draw_samples(np.array([50, 500, 40]), 100, random_state=0)
    array([ True, False,  True])
    """
    drawn = np.zeros(len(n_cells_each), bool)
    room = int(n_cells_each.sum()) if n_cells is None else n_cells
    for sample in np.random.default_rng(random_state).permutation(len(n_cells_each)):
        if n_cells_each[sample] <= room:
            drawn[sample] = True
            room -= n_cells_each[sample]
    return drawn
