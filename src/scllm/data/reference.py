"""What the embeddings of cells are compared with in pretraining: principal components of their whole profiles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from scllm._typing import FloatArray, IntArray
from scllm.data.genes import GeneMatch
from scllm.data.tokens import Tokens
from scllm.kernels.draws import uniform_entries
from scllm.kernels.thinning import thin_to

__all__ = ["Reference", "log_normalised"]

_TARGET_SUM = 1e4
_DEPTH = 11  # a salt that no other draw uses


def log_normalised(tokens: Tokens, *, is_logged: bool) -> FloatArray:
    """Return ``log1p`` of counts per 10,000 for each value of some cells; logged values stay as they are."""
    values = np.asarray(tokens.values, np.float64)
    if is_logged:
        return values
    cell = np.repeat(np.arange(len(tokens)), tokens.lengths)
    totals = np.bincount(cell, weights=values, minlength=len(tokens))
    return np.log1p(values * (_TARGET_SUM / np.maximum(totals, 1e-12)[cell]))


@dataclass(frozen=True)
class Reference:
    """Principal components of log-normalised cells, and how deeply the cells are sequenced.

    Parameters
    ----------
    axes
        Principal axes, ``(n_tokens, k)``; zero for genes that no file measured.
    mean
        Mean of each gene, ``(n_tokens,)``.
    is_logged
        Whether the values of the data are already on a logarithmic scale.
    depths
        Quantiles of the total count of a cell, ascending; empty if the data are no counts.
    """

    axes: FloatArray
    mean: FloatArray
    is_logged: bool
    depths: FloatArray

    def coordinates(self, tokens: Tokens, match: GeneMatch, rows: IntArray) -> FloatArray:
        """Project cells onto the axes and scale them to unit length, ``(b, k)`` float32.

        A gene that a cell's file did not measure has its mean there. A cell that lies in the centre stays zero.
        """
        values = log_normalised(tokens, is_logged=self.is_logged).astype(np.float32)
        shape = (len(tokens), len(self.axes))
        found = sparse.csr_matrix((values, tokens.genes, tokens.indptr), shape=shape) @ self.axes
        for file, cells in match.by_file(rows):
            found[cells] -= self.mean[file.measured] @ self.axes[file.measured]
        length = np.linalg.norm(found, axis=1, keepdims=True)
        return np.divide(found, length, out=np.zeros_like(found), where=length > 1e-6)

    def at_other_depths(self, tokens: Tokens, keys: NDArray[np.int64]) -> Tokens:
        """Downsample the counts of each cell towards the depth of a randomly drawn cell, if that is lower."""
        if tokens.values is None or not len(self.depths):
            return tokens
        draws = uniform_entries(np.arange(len(keys) + 1), np.zeros(len(keys), np.int64), keys, _DEPTH)
        depths = self.depths[(draws * len(self.depths)).astype(np.int64)]
        return Tokens(*thin_to(tokens.indptr, tokens.genes, tokens.values, keys, depths))

    def save(self, path: Path) -> None:
        """Write a file for :meth:`load`."""
        np.savez(path, axes=self.axes, mean=self.mean, is_logged=self.is_logged, depths=self.depths)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` has written."""
        with np.load(path, allow_pickle=False) as file:
            return cls(file["axes"], file["mean"], bool(file["is_logged"]), file["depths"])
