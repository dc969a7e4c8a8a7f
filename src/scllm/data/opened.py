"""Closing the files that a call has opened, when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

__all__ = ["closes_files", "files_closed", "opened"]

P = ParamSpec("P")
R = TypeVar("R")


class _Closable(Protocol):
    def close(self) -> None: ...


_of_call: ContextVar[list[_Closable] | None] = ContextVar("_of_call", default=None)


def opened(file: _Closable) -> None:
    """Note that this file was opened, for :func:`closes_files`."""
    files = _of_call.get()
    if files is not None:
        files.append(file)


@contextmanager
def files_closed() -> Iterator[None]:
    """Close all files that were opened within, at the end."""
    files: list[_Closable] = []
    token = _of_call.set(files)
    try:
        yield
    finally:
        _of_call.reset(token)
        for file in files:
            file.close()


def closes_files(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that all files opened during a call are closed when it returns or raises.

    That their variables end is not enough. A traceback, such as the one that a notebook keeps of the last error, keeps
    all variables of the call, and HDF5 lets nobody write to a file that is still open.
    """

    # not the decorator that contextlib makes: its frame would be the place at which warnings point
    @wraps(function)
    def closing(*args: P.args, **kwargs: P.kwargs) -> R:
        with files_closed():
            return function(*args, **kwargs)

    return closing
