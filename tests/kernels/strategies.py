"""Random ragged rows for the kernel tests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

KINDS = {
    "counts": lambda rng, n: rng.geometric(0.6, n),
    "wide counts": lambda rng, n: rng.integers(1, 10**6, n),
    "ties": lambda rng, n: np.full(n, 7),
    "normalised": lambda rng, n: np.log1p(rng.geometric(0.4, n) * 0.37),
    "continuous": lambda rng, n: rng.normal(size=n),
}


@st.composite
def ragged(draw, kinds=tuple(KINDS), dtypes=(np.float32, np.float64, np.int32, np.int64), longest=90):
    """Rows with empty ones, single entries, ties and stored zeros: ``indptr, data``."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = draw(st.lists(st.integers(0, 4) | st.integers(0, longest), max_size=6))
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(draw(st.sampled_from([np.int32, np.int64])))
    rows = [KINDS[draw(st.sampled_from(kinds))](rng, n) for n in lengths]
    data = np.concatenate([np.empty(0), *rows]).astype(draw(st.sampled_from(dtypes)))
    data[rng.random(data.size) < draw(st.sampled_from([0, 0.2]))] = 0
    return indptr, data


def rows_of(indptr, values):
    """The rows as a list of arrays."""
    return [values[begin:end] for begin, end in pairwise(indptr)]
