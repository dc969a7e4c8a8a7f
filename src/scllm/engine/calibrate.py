"""Calibration of a fine-tuned model's heads: the temperature, and what is kept to find cells of other types."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scllm._typing import IntArray
from scllm.engine import ranks
from scllm.engine.device import autocast
from scllm.engine.head_start import whitening
from scllm.engine.loader import Loader
from scllm.models.base import CellModel, HeadSpec
from scllm.models.known_cells import KnownCells

__all__ = ["calibrate"]

# With this many cells, the log of the fitted temperature is halved: a few cells that are all classified correctly would
# make every prediction look certain.
_HALF_TRUSTED = 50
_MAX_CELLS = 10_000
# training cells per head whose logits are computed: enough for the covariance of some hundred labels
_MAX_KNOWN = 4096
# Share of the mean variance that is added to the variance of each direction, because logits hardly vary in one of them.
# From 0.001 to 0.1, it changes nothing on the pancreas cells of docs/unseen_types.md.
_RIDGE = 0.03


@dataclass(frozen=True)
class _Read:
    """Logits ``(n, k)`` and label codes ``(n,)`` of a head, for cells in the order of their rows."""

    logits: Tensor
    labels: Tensor

    @property
    def known(self) -> Tensor:
        """Which cells have a label."""
        return self.labels >= 0


@torch.no_grad()
def calibrate(model: CellModel, training: Loader, validation: Loader | None, precision: str) -> None:
    """Set the temperature of each head on labels, and what it keeps of its cells, in place; all ranks must call this.

    The temperature is that of Guo et al. (2017) on the validation cells; without them, it stays as it is.
    """
    specs = {spec.key: spec for spec in model.head_specs if spec.classes is not None}
    if not specs:
        return
    model.eval()
    judged: dict[str, _Read] = {}
    if validation is not None:
        rows, rng = validation.rows, np.random.default_rng(validation.seed)
        if len(rows) > _MAX_CELLS:
            rows = np.sort(rng.choice(rows, _MAX_CELLS, replace=False))
        judged = _read(model, validation, rows, list(specs), precision)
        specs = {key: _with_temperature(spec, judged[key]) for key, spec in specs.items()}
        model.head_specs = tuple(specs.get(spec.key, spec) for spec in model.head_specs)
    seen = _read(model, _plain(training, model), _balanced(training, list(specs)), list(specs), precision)
    model.known_cells = {key: _known_cells(spec, seen[key], judged.get(key)) for key, spec in specs.items()}


def _plain(training: Loader, model: CellModel) -> Loader:
    """Return the training cells as they are read after training: whole, in order and each once."""
    return replace(training, encoder=model.encoder, weights=None, downsample=0.0, training=False)


def _balanced(training: Loader, keys: list[str]) -> IntArray:
    """Draw at most ``_MAX_KNOWN`` training cells for each head, equally many of each label as far as there are any."""
    rows = training.rows if training.weights is None else training.rows[np.asarray(training.weights) > 0]
    rng, chosen = np.random.default_rng(training.seed), []
    for key in keys:
        label = training.obs[f"label:{key}"]
        cells = rng.permutation(rows[label[rows] >= 0])
        place = pd.Series(cells).groupby(label[cells]).cumcount()
        chosen.append(cells[np.argsort(place.to_numpy(), kind="stable")[:_MAX_KNOWN]])
    return np.unique(np.concatenate(chosen))


def _read(model: CellModel, cells: Loader, rows: IntArray, keys: list[str], precision: str) -> dict[str, _Read]:
    """Run the model on rows of the source; every rank gets the results of all ranks."""
    # ranks take turns in each batch, so rows say where a result belongs
    obs = {**cells.obs, "row": np.arange(cells.source.n_obs)}
    cells = replace(cells, rows=rows, obs=obs, keep_empty=False)
    parts: list[tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]] = []
    with closing(cells.epoch(0, rank=ranks.rank(), world=ranks.world())) as read:
        for batch in chain.from_iterable(read):
            batch = batch.to(model.device)
            with autocast(precision, model.device):
                outputs = model.head_outputs(batch)
            found = {key: (outputs[key].float().cpu(), batch.obs[f"label:{key}"].cpu()) for key in keys}
            parts.append((batch.obs["row"].cpu(), found))
    parts = ranks.gathered(parts)
    order = torch.cat([row for row, _ in parts]).argsort()
    return {
        key: _Read(*(torch.cat(column)[order] for column in zip(*(found[key] for _, found in parts), strict=True)))
        for key in keys
    }


def _with_temperature(spec: HeadSpec, judged: _Read) -> HeadSpec:
    # scikit-learn takes a second to import, in every process of a run; only this function needs it
    from scllm.metrics import temperature

    found, n_cells = temperature(judged.logits.numpy(), judged.labels.numpy()), int(judged.known.sum())
    return replace(spec, temperature=found ** (n_cells / (n_cells + _HALF_TRUSTED)))


def _known_cells(spec: HeadSpec, seen: _Read, judged: _Read | None) -> KnownCells:
    """Describe the training cells of a head, and score its validation cells."""
    logits, labels = seen.logits[seen.known], seen.labels[seen.known]
    center, whiten = whitening(logits, _RIDGE, labels)
    means = torch.stack([((logits[labels == code] - center) @ whiten).mean(0) for code in labels.unique()])
    nothing = np.zeros(0, np.float32)
    known = KnownCells(center.numpy(), whiten.numpy(), means.numpy(), nothing, nothing)
    if judged is None or not judged.known.any():
        return known
    logits = judged.logits[judged.known]
    probability = (logits / spec.temperature).softmax(1).amax(1)
    return replace(known, probability=np.sort(probability.numpy()), distance=np.sort(known.distances(logits.numpy())))
