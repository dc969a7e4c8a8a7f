"""Small simulated data with known structure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import sparse

from scllm import _keys
from scllm._typing import FloatArray, IntArray

__all__ = ["toy"]

_CELL_TYPES = ("alpha", "beta", "delta", "gamma")
_BATCHES = ("batch1", "batch2")
_BATCH_DEPTH = (1.0, 0.6)
_BATCH_EFFECT = 0.4  # standard deviation of a gene's log fold change between the batches
_MARKER_FOLD = 12.0
_TARGET_RANGE = (0.2, 4.0)  # expression of a target if the regulator is off, and if it is fully on
_COUNTS_PER_GENE = 0.8
_CHUNK = 1024
_MIN_GENES = 20


def toy(*, n_cells: int = 600, n_genes: int = 200, random_state: int = 0) -> AnnData:
    """Simulate cells with marker genes, a batch effect, and one regulator that drives its targets.

    Use it for tests and for trying functions out, because it is known what a model should find. Counts are Poisson.
    Their rate is the product of the cell's depth, the gene's level, 12 if the gene is a marker of the cell's type, a
    log-normal factor of gene and batch (the second batch is also shallower), and, for targets, the regulator's level in
    the cell. That level is between 0 and 1, mostly near 0 or 1, and does not depend on type or batch.

    Parameters
    ----------
    n_cells
        Number of cells, divided evenly between 4 types and, independently, 2 batches.
    n_genes
        Number of genes, at least 20. Each type has a twentieth of them (at least 2) as markers, as many genes are
        targets, one is the regulator, and all others are background. Roles are assigned at random.
    random_state
        Random seed.

    Returns
    -------
    Counts in ``X`` (CSR float32), ``obs["cell_type"]``, ``obs["batch"]``, ``obs["regulator_level"]``, and the roles of
    genes in ``uns["toy"]``: ``markers`` (a table of ``gene`` and ``cell_type``), ``regulator`` and ``targets``.

    Examples
    --------
    >>> import scllm
    >>> adata = scllm.datasets.toy(n_cells=100)
    >>> adata.shape, len(adata.uns["toy"]["targets"])
    ((100, 200), 10)
    """
    if n_genes < _MIN_GENES or n_cells < 1:
        raise ValueError(
            f"Expected at least 1 cell and {_MIN_GENES} genes, which the simulated structure needs, got "
            f"n_cells={n_cells} and n_genes={n_genes}. Pass larger numbers."
        )
    rng = np.random.default_rng(random_state)
    plan = _Plan.draw(n_genes, rng)
    cell_type = rng.permutation(np.arange(n_cells) % len(_CELL_TYPES))
    batch = rng.permutation(np.arange(n_cells) % len(_BATCHES))
    level = rng.beta(0.4, 0.4, n_cells)
    depth = rng.lognormal(0, 0.3, n_cells) * np.array(_BATCH_DEPTH)[batch]
    chunks = [slice(start, start + _CHUNK) for start in range(0, n_cells, _CHUNK)]
    counts = [
        sparse.csr_matrix(rng.poisson(plan.rates(cell_type[c], batch[c], level[c]) * depth[c, None]), dtype=np.float32)
        for c in chunks
    ]
    obs = pd.DataFrame(
        {
            _keys.CELL_TYPE: pd.Categorical.from_codes(cell_type, list(_CELL_TYPES)),
            _keys.BATCH: pd.Categorical.from_codes(batch, list(_BATCHES)),
            _keys.REGULATOR_LEVEL: level.astype(np.float32),
        },
        index=[f"cell{cell}" for cell in range(n_cells)],
    )
    genes = pd.Index([f"gene{gene}" for gene in range(n_genes)])
    adata = AnnData(sparse.vstack(counts, format="csr"), obs=obs, var=pd.DataFrame(index=genes))
    adata.uns[_keys.TOY] = {
        "markers": pd.DataFrame(
            {"gene": genes[plan.markers.ravel()], "cell_type": np.repeat(_CELL_TYPES, plan.markers.shape[1])}
        ),
        "regulator": genes[plan.regulator],
        "targets": genes[plan.targets].to_numpy(),
    }
    return adata


@dataclass(frozen=True)
class _Plan:
    """Roles of the genes."""

    level: FloatArray  # (g,)
    batch_effect: FloatArray  # (n_batches, g)
    markers: IntArray  # (n_types, markers a type)
    regulator: int
    targets: IntArray

    @classmethod
    def draw(cls, n_genes: int, rng: Generator) -> _Plan:
        n_each = max(2, n_genes // 20)
        order = rng.permutation(n_genes)
        n_markers = n_each * len(_CELL_TYPES)
        level = rng.lognormal(0, 0.8, n_genes)
        # markers, regulator and targets are expressed strongly enough to be detected
        level[order[: n_markers + 1 + n_each]] = rng.uniform(0.5, 1.5, n_markers + 1 + n_each)
        return cls(
            level=level * _COUNTS_PER_GENE / level.mean(),
            batch_effect=np.exp(rng.normal(0, _BATCH_EFFECT, (len(_BATCHES), n_genes))),
            markers=order[:n_markers].reshape(len(_CELL_TYPES), n_each),
            regulator=int(order[n_markers]),
            targets=np.sort(order[n_markers + 1 : n_markers + 1 + n_each]),
        )

    def rates(self, cell_type: IntArray, batch: IntArray, level: FloatArray) -> NDArray[np.float64]:
        """Compute expected counts at depth 1, ``(n_cells, g)``."""
        fold = np.ones((len(_CELL_TYPES), len(self.level)))
        np.put_along_axis(fold, self.markers, _MARKER_FOLD, axis=1)
        rates = self.level * fold[cell_type] * self.batch_effect[batch]
        off, on = _TARGET_RANGE
        rates[:, self.regulator] *= on * level
        rates[:, self.targets] *= (off + (on - off) * level)[:, None]
        return rates
