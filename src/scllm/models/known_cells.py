"""What a model keeps of the cells that a head was trained and validated on, to find cells of other types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scllm._typing import FloatArray

if TYPE_CHECKING:
    from scllm.models.base import CellModel
    from scllm.models.batch import Batch
    from scllm.models.heads import HeadSpec

__all__ = ["KnownCells", "known_arrays", "outputs_and_inputs", "read_known_cells"]


@dataclass(frozen=True)
class KnownCells:
    """Training cells of a head in short, and scores of its validation cells.

    A state of a cell is what the last linear layer of the head reads.

    Parameters
    ----------
    center
        Mean state of the training cells, ``(e,)``.
    discriminants
        Linear discriminants ``(e, r)``: the directions in which the means of the labels differ, scaled so that the
        regularised covariance within labels is the identity.
    means
        Mean of each label along the discriminants, ``(k, r)``; labels without cells are left out.
    probability, distance
        Probability of the best label and distance of each labelled validation cell, ascending, ``(n,)``.
    """

    center: FloatArray
    discriminants: FloatArray
    means: FloatArray
    probability: FloatArray
    distance: FloatArray

    def distances(self, states: Tensor) -> Tensor:
        """Compute the Mahalanobis distance of states ``(b, e)`` to the closest mean of a label, ``(b,)``.

        All labels share one covariance matrix (Lee et al., "A simple unified framework for detecting
        out-of-distribution samples and adversarial attacks", NeurIPS 2018, arXiv:1807.03888). Only directions in which
        the labels differ count: in all others, cells differ by depth, donor and batch (docs/unseen_types.md).
        """
        arrays = (self.center, self.discriminants, self.means)
        center, discriminants, means = (torch.from_numpy(array).to(states.device) for array in arrays)
        # in bfloat16, differences of close cells would be lost
        with torch.autocast(states.device.type, enabled=False):
            along = (states.float() - center) @ discriminants
            return torch.cdist(along, means, compute_mode="donot_use_mm_for_euclid_dist").amin(1)


def outputs_and_inputs(model: CellModel, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the outputs of every head on cells, and what the last linear layer of each reads, ``(b, e)``, by key."""
    inputs: dict[str, Tensor] = {}

    def reading(key: str) -> Any:
        return lambda _, args: inputs.__setitem__(key, args[0])

    last = {
        key: [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1:]
        for key, head in model.heads_on("cell").items()
    }
    hooks = [layer.register_forward_pre_hook(reading(key)) for key, layers in last.items() for layer in layers]
    try:
        return model.head_outputs(batch), inputs
    finally:
        for hook in hooks:
            hook.remove()


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
