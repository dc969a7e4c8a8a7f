"""Logging of losses to TensorBoard or Weights & Biases, in addition to the history file, only on request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from scllm.engine.config import Logger
from scllm.engine.run import Run

__all__ = ["check_tracker", "tracker"]

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def check_tracker(name: Logger | None) -> None:
    """Raise an error if the package of a logger is not installed."""
    if name is not None and find_spec(_PACKAGES[name]) is None:
        raise ImportError(
            f"logger={name!r} needs the package {_PACKAGES[name]}, which is not installed. Run: pip install "
            '"scllm-tools[log]"'
        )


@contextmanager
def tracker(name: Logger | None, run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that sends a line of the history to the logger; without a logger, it does nothing."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run.path / "tensorboard")

        def to_tensorboard(line: dict[str, Any]) -> None:
            for key, value in line.items():
                if isinstance(value, float):
                    writer.add_scalar(f"{line['split']}/{key}", value, line["step"])
            writer.flush()

        try:
            yield to_tensorboard
        finally:
            writer.close()
    elif name == "wandb":
        import wandb

        session = wandb.init(
            project="scllm",
            name=run.path.name,
            dir=run.path,
            config=run.spec.train.to_dict(),
            resume="allow",
            id=_id(run),
            reinit="finish_previous",
        )

        def to_wandb(line: dict[str, Any]) -> None:
            session.log({f"{line['split']}/{k}": v for k, v in line.items() if isinstance(v, float)}, step=line["step"])

        try:
            yield to_wandb
        finally:
            session.finish()
    else:
        yield lambda line: None


def _id(run: Run) -> str:
    """Make an id of the directory, so that a resumed run keeps its id."""
    return hashlib.blake2b(str(run.path.absolute()).encode(), digest_size=8).hexdigest()
