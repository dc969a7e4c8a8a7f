"""A model family of another package that fails once, at a step of a rank that the environment names.

``FAULT="raise:5:1:/folder"`` raises at step 5 of rank 1, unless the folder says that it has done so before.
``FAULT="memory:100:0:/folder"`` asks for more memory than there is in training with more than 100 tokens.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from scllm.engine import ranks
from scllm.models import scgpt

FINETUNE, PRETRAIN, SIZES = scgpt.FINETUNE, scgpt.PRETRAIN, scgpt.SIZES


@dataclass(frozen=True)
class Config(scgpt.Config):
    pass


class Model(scgpt.Model):
    family = "engine.faulty"

    def inputs(self, batch):
        kind, n_tokens, *_ = os.environ.get("FAULT", "none:0:0:.").split(":")
        if kind == "memory" and len(batch.genes) > int(n_tokens) and self.training:
            torch.empty(1 << 60)  # more than any machine has
        return super().inputs(batch)

    def at_step(self, step: int, random_state: int) -> None:
        super().at_step(step, random_state)
        self.is_broken = False
        kind, at, rank, folder = os.environ.get("FAULT", "none:0:0:.").split(":")
        marker = Path(folder) / f"done-{kind}"
        if kind in ("none", "memory") or step != int(at) or ranks.rank() != int(rank) or marker.exists():
            return
        marker.touch()
        if kind == "raise":
            raise ArithmeticError("this rank fails alone")
        if kind == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "nan":
            self.is_broken = True

    def hidden(self, batch, *args, **options):
        found = super().hidden(batch, *args, **options)
        return found * torch.nan if self.is_broken else found
