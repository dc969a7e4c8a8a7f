"""What the simplest models of token sequences reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.special import gammaln

from scllm._typing import CSR

__all__ = ["permutation_bound", "unigram_nats"]


def permutation_bound(n_genes: ArrayLike) -> float:
    """``ln(n!) / n``: nats a gene below which no model tells the random order of ``n`` distinct genes, known or not.

    Of several sentences, summed over all before it is divided by the genes of all.

    Parameters
    ----------
    n_genes
        Genes of each sentence.

    Examples
    --------
    >>> round(permutation_bound([40]), 3)
    2.758
    """
    n = np.asarray(n_genes, float)
    return float(gammaln(n + 1).sum() / n.sum()) if n.sum() else np.nan


def unigram_nats(counts: CSR) -> tuple[float, float]:
    """Nats a gene of the two simplest models of gene sentences, each gene left out of what predicts it.

    Parameters
    ----------
    counts
        How often each gene stands in each place, places by genes.

    Returns
    -------
    The nats where every gene is as likely as it is frequent (each counted once more), and where that is mixed with how
    frequent it is in its place. The mixing weight is the best of 1, 10, ... 10,000.
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
