"""Networks from expression alone, beside which a model's network is scored."""

from __future__ import annotations

import numpy as np

from scllm._typing import CSR, FloatArray, IntArray

__all__ = ["expression_networks"]

_N_TREES, _MOST_CELLS = 50, 500
# with fewer candidates, importances say little, and all genes are candidates
_FEWEST_SOURCES = 10
_SHRINKAGE = 0.1


def expression_networks(x: CSR, sources: IntArray, random_state: int = 0) -> dict[str, FloatArray]:
    """Return the strength of links between genes, from cells by genes of ``log1p`` expression, ``(m, m)`` each.

    - ``correlation``: Pearson.
    - ``partial correlation``: from the inverse of the correlation matrix, shrunk by 0.1 towards the identity.
    - ``random forest``: importance of each source for the prediction of a target from all sources (from all genes, if
      there are fewer than ten sources), as in GENIE3 (Huynh-Thu et al. 2010, doi:10.1371/journal.pone.0012776), in at
      most 500 cells.
    """
    from sklearn.covariance import shrunk_covariance

    correlation = _correlation(x)
    precision = np.linalg.inv(shrunk_covariance(correlation, _SHRINKAGE))
    scale = np.sqrt(np.diag(precision))
    found = {"correlation": correlation, "partial correlation": -precision / np.outer(scale, scale)}
    found["random forest"] = _forest(x, sources, random_state)
    for weight in found.values():
        np.fill_diagonal(weight, 0)
    return found


def _correlation(x: CSR) -> FloatArray:
    """Correlate columns without a dense copy of the cells."""
    n, mean = x.shape[0], np.asarray(x.mean(0)).ravel()
    product = (x.T @ x).tocoo()
    squares = np.zeros(product.shape)
    squares[product.row, product.col] = product.data
    covariance = squares / n - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(np.diag(covariance), 0))
    spread[spread == 0] = np.inf
    found = covariance / np.outer(spread, spread)
    np.fill_diagonal(found, 1)
    return found


def _forest(x: CSR, sources: IntArray, seed: int) -> FloatArray:
    from sklearn.ensemble import RandomForestRegressor

    sources = sources if len(sources) >= _FEWEST_SOURCES else np.arange(x.shape[1])
    rng = np.random.default_rng(seed)
    cells = np.sort(rng.choice(x.shape[0], min(x.shape[0], _MOST_CELLS), replace=False))
    columns = x[cells].tocsc()
    read = np.column_stack([_column(columns, source) for source in sources])
    weight = np.zeros((x.shape[1], x.shape[1]))
    for target in range(x.shape[1]):
        others = sources != target
        if not others.any():
            continue
        forest = RandomForestRegressor(_N_TREES, max_features="sqrt", min_samples_leaf=5, random_state=seed)
        weight[sources[others], target] = forest.fit(read[:, others], _column(columns, target)).feature_importances_
    return weight


def _column(x, gene: int) -> FloatArray:
    """One gene in all cells."""
    out = np.zeros(x.shape[0])
    part = slice(x.indptr[gene], x.indptr[gene + 1])
    out[x.indices[part]] = x.data[part]
    return out
