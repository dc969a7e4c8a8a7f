"""Areas under curves of cells that count more or less often, for many weightings of one ranking."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scllm.kernels._jit import jit

__all__ = ["Ranking"]


class Ranking:
    """Cells sorted once by their score, highest first, for any number of weightings.

    Parameters
    ----------
    score
        Score of each cell, ``(n,)``; cells of the class should score high.
    is_class
        Whether the cell is of the class, ``(n,)``.
    """

    def __init__(self, score: NDArray[np.floating], is_class: NDArray[np.bool_]) -> None:
        self._order = np.argsort(-score, kind="stable")
        ranked = score[self._order]
        self._is_last_of_ties = np.append(ranked[1:] != ranked[:-1], True)
        self._is_class = is_class[self._order]

    def areas(self, weights: NDArray[np.integer]) -> NDArray[np.float64]:
        """Compute the area under the ROC curve and the average precision of each row of weights.

        A row costs one pass over the cells. Pairs of equal score count one half.

        Parameters
        ----------
        weights
            How often each cell counts, ``(r, n)``.

        Returns
        -------
        Areas and average precisions, ``(2, r)``; NaN where the class or the rest has no weight.
        """
        areas = np.empty((2, len(weights)))
        _ranking_areas(self._order, self._is_last_of_ties, self._is_class, weights, areas[0], areas[1])
        return areas


@jit
def _ranking_areas(order, is_last_of_ties, is_class, weights, auroc, average_precision):
    for row in range(weights.shape[0]):
        hits = misses = 0.0  # weight of the class and of the rest above the present score
        tied_hits = tied_misses = 0.0
        wrong_pairs = precision = 0.0
        for place in range(order.size):
            if is_class[place]:
                tied_hits += weights[row, order[place]]
            else:
                tied_misses += weights[row, order[place]]
            if is_last_of_ties[place]:
                wrong_pairs += tied_hits * (misses + tied_misses / 2)
                hits += tied_hits
                misses += tied_misses
                if tied_hits > 0:
                    precision += tied_hits * hits / (hits + misses)
                tied_hits = tied_misses = 0.0
        is_defined = hits > 0 and misses > 0
        auroc[row] = 1 - wrong_pairs / (hits * misses) if is_defined else np.nan
        average_precision[row] = precision / hits if is_defined else np.nan
