"""Temperature scaling of a fine-tuned model's heads on validation cells."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from scllm.engine import ranks
from scllm.engine.device import autocast
from scllm.engine.loader import Loader
from scllm.models.base import CellModel

__all__ = ["calibrate"]

# With this many cells, the log of the fitted temperature is halved: a few cells that are all classified correctly would
# make every prediction look certain.
_HALF_TRUSTED = 50
_MAX_CELLS = 10_000


@torch.no_grad()
def calibrate(model: CellModel, validation: Loader, precision: str) -> None:
    """Set the temperature of each classification head, in place (Guo et al. 2017); all ranks must call this."""
    # scikit-learn takes a second to import, in every process of a run; only this function needs it
    from scllm.metrics import temperature

    if len(validation.rows) > _MAX_CELLS:
        chosen = np.random.default_rng(validation.seed).choice(validation.rows, _MAX_CELLS, replace=False)
        validation = replace(validation, rows=np.sort(chosen))
    model.eval()
    logits: dict[str, list[torch.Tensor]] = {spec.key: [] for spec in model.head_specs}
    labels: dict[str, list[torch.Tensor]] = {spec.key: [] for spec in model.head_specs}
    with closing(validation.epoch(0, rank=ranks.rank(), world=ranks.world())) as read:
        for batch in chain.from_iterable(read):
            batch = batch.to(model.device)
            with autocast(precision, model.device):
                outputs = model.head_outputs(batch)
            for key, output in outputs.items():
                logits[key].append(output.float().cpu())
                labels[key].append(batch.obs[f"label:{key}"].cpu())
    specs = []
    for spec in model.head_specs:
        if spec.classes is not None:
            known = torch.cat(ranks.gathered(labels[spec.key])).numpy()
            found = temperature(torch.cat(ranks.gathered(logits[spec.key])).numpy(), known)
            n_cells = int((known >= 0).sum())
            spec = replace(spec, temperature=found ** (n_cells / (n_cells + _HALF_TRUSTED)))
        specs.append(spec)
    model.head_specs = tuple(specs)
