"""The library's logger and progress bars. Nothing is configured on import; only the first rank speaks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from scllm import settings

__all__ = ["is_first_rank", "log", "progress", "show_progress", "warn"]

T = TypeVar("T")
log = logging.getLogger("scllm")
_PACKAGE = f"{Path(__file__).parent}{os.sep}"


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


def progress(items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it") -> Generator[T, None, None]:
    """Iterate with a progress bar where :func:`show_progress` allows one."""
    with tqdm(items, desc=desc, total=total, unit=unit, disable=not show_progress(), leave=False) as bar:
        yield from bar


def warn(message: str) -> None:
    """A ``UserWarning`` that points at the line outside of this package from which the way leads here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
