"""What a model keeps of the cells that a head was trained and validated on, to find cells of other types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from scllm._typing import FloatArray

if TYPE_CHECKING:
    from scllm.models.heads import HeadSpec

__all__ = ["KnownCells", "known_arrays", "read_known_cells"]


@dataclass(frozen=True)
class KnownCells:
    """Logits of the training cells of a head in short, and scores of its validation cells.

    Logits are linear in what the last layer of the head reads, and depend only on directions in which labels differ. In
    all others, cells differ by depth, donor and batch, and distances say less about their type (docs/unseen_types.md).

    Parameters
    ----------
    center
        Mean logits of the training cells, ``(k,)``.
    whiten
        Matrix after which centred logits have a regularised covariance within labels of one, ``(k, k)``.
    means
        Mean of each label's centred logits after ``whiten``, ``(n, k)``; labels without cells are left out.
    probability, distance
        Probability of the best label and distance of each labelled validation cell, ascending.
    """

    center: FloatArray
    whiten: FloatArray
    means: FloatArray
    probability: FloatArray
    distance: FloatArray

    def distances(self, logits: FloatArray) -> FloatArray:
        """Compute the Mahalanobis distance of logits ``(b, k)`` to the closest mean of a label, ``(b,)``.

        All labels share one covariance matrix (Lee et al., "A simple unified framework for detecting
        out-of-distribution samples and adversarial attacks", NeurIPS 2018, arXiv:1807.03888).
        """
        white = (logits - self.center) @ self.whiten
        return np.min([np.linalg.norm(white - mean, axis=1) for mean in self.means], axis=0)


def known_arrays(specs: Sequence[HeadSpec], known: Mapping[str, KnownCells]) -> dict[str, NDArray[Any]]:
    """Return what is kept for each head as arrays for a file, named by the number of the head."""
    return {
        f"{number}.{field.name}": getattr(known[spec.key], field.name)
        for number, spec in enumerate(specs)
        if spec.key in known
        for field in fields(KnownCells)
    }


def read_known_cells(file: Path, specs: Sequence[HeadSpec]) -> dict[str, KnownCells]:
    """Read what is kept for each head, by key; nothing if there is no file, as in folders of earlier versions."""
    if not file.is_file():
        return {}
    names = [field.name for field in fields(KnownCells)]
    try:
        # numpy would leave a damaged file open
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
            return {
                spec.key: KnownCells(**{name: stored[f"{number}.{name}"] for name in names})
                for number, spec in enumerate(specs)
                if f"{number}.{names[0]}" in stored
            }
    except (BadZipFile, EOFError, KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"Expected the arrays of training cells in {file}, but it cannot be read ({error}). It is truncated or "
            "damaged: copy it again, or remove it to use the model without distances."
        ) from error
