"""The library's logger, warnings and progress bars, which all follow ``settings.verbosity``.

Nothing is configured on import. The first line that is logged adds a handler to the logger, unless a handler of the
application shows the line. Only the first rank logs.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from scllm import settings

__all__ = ["DataWarning", "details", "is_first_rank", "log", "progress", "quiet_imports", "show_progress", "warn"]

T = TypeVar("T")
_PACKAGE = f"{Path(__file__).parent}{os.sep}"
# the lowest level that is shown for each verbosity
_LOWEST = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
_in_details: ContextVar[bool] = ContextVar("in_details", default=False)


def is_first_rank() -> bool:
    """Whether this process is the one that logs (``RANK`` is set by torchrun)."""
    return os.environ.get("RANK", "0") == "0"


def _verbosity() -> int:
    """Return ``settings.verbosity``; raise ``TypeError`` if it is not a number."""
    value: Any = settings.verbosity
    if not isinstance(value, Integral):
        raise TypeError(f"Expected scllm.settings.verbosity of 0, 1, 2 or 3, got {value!r}. Set it to one of those.")
    return min(max(int(value), 0), 3)


class _Log(logging.LoggerAdapter[logging.Logger]):
    """The logger ``scllm``, set up when its first line is logged."""

    def isEnabledFor(self, level: int) -> bool:
        """Whether a line of this level is to be shown, with the verbosity as it is now."""
        if level < _LOWEST[_verbosity()] or (level < logging.ERROR and not is_first_rank()):
            return False
        if self.logger.level == logging.NOTSET:
            self.logger.setLevel(logging.DEBUG)  # the level is left to verbosity
        if not _is_shown(self.logger, level):
            self.logger.addHandler(_plain)
        return self.logger.isEnabledFor(level)

    def info(self, msg: object, *args: object, **kwargs: Any) -> None:
        """Log information for the user; within :func:`details` only with verbosity 3."""
        self.log(logging.DEBUG if _in_details.get() else logging.INFO, msg, *args, **kwargs)


class _PlainLines(logging.Handler):
    """Prints messages unformatted and without breaking progress bars, unless another handler shows them."""

    def emit(self, record: logging.LogRecord) -> None:
        if _is_shown(log.logger, record.levelno, by_others=True):
            return
        prefix = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        # looked up each time, because pytest and notebooks replace these streams
        tqdm.write(prefix + record.getMessage(), file=sys.stdout if _in_notebook() else sys.stderr)


_plain = _PlainLines()
log = _Log(logging.getLogger("scllm"))


def _is_shown(logger: logging.Logger | None, level: int, by_others: bool = False) -> bool:
    """Whether a handler of the logger, or of a parent that it propagates to, shows a level."""
    while logger is not None:
        if any(level >= handler.level and not (by_others and handler is _plain) for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


@contextmanager
def details() -> Iterator[None]:
    """Log information as details, within a function that has already logged what the user needs to know."""
    token = _in_details.set(True)
    try:
        yield
    finally:
        _in_details.reset(token)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence log lines and warnings during imports of packages that import others by themselves.

    transformers and peft import torchao if it is installed, and torchao warns of kernels that it cannot load.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def show_progress() -> bool:
    """Whether progress bars are shown: in terminals and notebooks, on the first rank, unless verbosity is 0."""
    return _verbosity() > 0 and is_first_rank() and (_in_notebook() or sys.stderr.isatty())


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def progress(items: Iterable[T], *, desc: str, total: int | None = None, unit: str = "it") -> Generator[T, None, None]:
    """Iterate with a progress bar, if :func:`show_progress` allows it."""
    with tqdm(items, desc=desc, total=total, unit=unit, disable=not show_progress(), leave=False) as bar:
        yield from bar


class DataWarning(UserWarning):
    """A fact about the data, which a function that trains on parts of them would repeat for each part."""


def warn(message: str, category: type[UserWarning] = UserWarning) -> None:
    """Issue a warning that points to the line outside this package that led to it."""
    if _verbosity() == 0:
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
