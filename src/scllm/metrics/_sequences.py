"""Scores of the simplest models of token sequences."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.special import gammaln

from scllm._typing import CSR

__all__ = ["permutation_bound", "unigram_nats"]


def permutation_bound(n_genes: ArrayLike) -> float:
    """Compute ``ln(n!) / n``, the lowest possible nats per gene for a random order of ``n`` distinct genes.

    The bound holds even for a model that knows which genes they are. For several sequences, it is the sum over all
    sequences divided by the number of all genes.

    Parameters
    ----------
    n_genes
        Number of genes of each sequence.

    Examples
    --------
    >>> round(permutation_bound([40]), 3)
    2.758
    """
    n = np.asarray(n_genes, float)
    return float(gammaln(n + 1).sum() / n.sum()) if n.sum() else np.nan


def unigram_nats(counts: CSR) -> tuple[float, float]:
    """Compute nats per gene of two unigram models, holding each gene out of its own estimate.

    Parameters
    ----------
    counts
        How often each gene is at each position, positions by genes.

    Returns
    -------
    The nats of a model that knows the frequency of each gene (with a pseudocount of one), and of a model that mixes
    this with the frequency of each gene at each position. The mixing weight is the best of 1, 10, ... 10,000.
    """
    seen = np.asarray(counts.sum(0), float).ravel()
    total = seen.sum()
    if not total:
        return np.nan, np.nan
    anywhere = seen / (total - 1 + counts.shape[1])
    here = sparse.coo_array(counts)
    n, gene = here.data.astype(float), here.coords[1]
    in_place = np.asarray(counts.sum(1), float).ravel()[here.coords[0]]
    by_place = [
        -(n * np.log((n - 1 + weight * anywhere[gene]) / (in_place - 1 + weight))).sum() / total
        for weight in 10.0 ** np.arange(5)
    ]
    return float(-(seen[seen > 0] * np.log(anywhere[seen > 0])).sum() / total), float(min(by_place))
