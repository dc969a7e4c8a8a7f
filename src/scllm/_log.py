"""The library's logger and progress bars. Nothing is configured on import; only the first rank speaks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

from scllm import settings

__all__ = ["is_first_rank", "log", "progress", "show_progress"]

T = TypeVar("T")
log = logging.getLogger("scllm")


def is_first_rank() -> bool:
    """Whether this process is the one that speaks (``RANK`` is set by torchrun)."""
    return os.environ.get("RANK", "0") == "0"


class _FirstRankOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or is_first_rank()


log.addFilter(_FirstRankOnly())


def show_progress() -> bool:
    """Whether progress bars are drawn: in terminals and notebooks, on the first rank, unless switched off."""
    in_notebook = "ipykernel" in sys.modules
    return settings.verbosity > 0 and is_first_rank() and (in_notebook or sys.stderr.isatty())


def progress(items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate with a progress bar where :func:`show_progress` allows one."""
    return iter(tqdm(items, desc=desc, total=total, unit=unit, disable=not show_progress(), leave=False))
