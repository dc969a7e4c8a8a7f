"""Histograms of each gene's values, with bin widths proportional to the value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scllm.kernels._jit import jit

__all__ = ["BIN_CENTRES", "add_to_tally"]

# a bin shares exponent and leading digits of a float32: 64 bins for each doubling from 2^-12 to 2^16
_DIGITS = 6
_LOWEST, _HIGHEST = 2.0**-12, 2.0**16
_SHIFT = np.uint32(23 - _DIGITS)
_FIRST = int(np.float32(_LOWEST).view(np.uint32) >> _SHIFT)
_N_BINS = int(np.float32(_HIGHEST).view(np.uint32) >> _SHIFT) - _FIRST

_edges = (np.arange(_FIRST, _FIRST + _N_BINS + 1, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
BIN_CENTRES = (_edges[:-1] + _edges[1:]) / 2
"""Middle of each bin; a value differs from it by at most 1/128 of itself."""


def add_to_tally(genes: NDArray[np.integer], values: NDArray[np.floating], tally: NDArray[np.uint32]) -> None:
    """Count values into the histogram of their gene.

    Parameters
    ----------
    genes
        Row of ``tally`` of each value.
    values
        Positive numbers; those outside 2^-12 to 2^16 go into the outermost bins.
    tally
        ``(n_genes, len(BIN_CENTRES))``, changed in place.
    """
    _add(genes, np.asarray(values, np.float32).view(np.uint32), tally)


@jit
def _add(genes, bits, tally):
    for j in range(genes.size):
        place = np.int64(bits[j] >> _SHIFT) - _FIRST
        tally[genes[j], min(max(place, 0), _N_BINS - 1)] += np.uint32(1)
