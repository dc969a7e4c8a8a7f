"""The one place where numba options are set.

Compiled code is cached beside the source and renewed when that file changes. A kernel that calls another file's is not
renewed by a change there: delete ``kernels/__pycache__`` after editing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import numba

__all__ = ["RowKernel", "jit", "row_kernel"]

# fastmath stays off: bins and ranks must be those of numpy to the last bit
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": False, "error_model": "numpy"}

# below this many entries starting threads costs more than they save
_ENTRIES_FOR_THREADS = 200_000


def jit(function: Callable) -> Callable:
    """Compile for one thread, without the GIL."""
    return numba.njit(**_OPTIONS)(function)


class RowKernel:
    """A kernel over ragged rows, compiled with and without threads.

    The first argument is ``indptr``; the outer loop is a ``numba.prange`` whose turns do not depend on each other, so
    that both variants and any number of threads give the same result. Threads are used on large inputs and from the
    main thread only: numba's built-in thread pool aborts the process when two threads enter it, and a loader thread
    should not compete with the model for the cores. ``numba.set_num_threads`` and ``NUMBA_NUM_THREADS`` limit them.
    """

    def __init__(self, function: Callable) -> None:
        self.serial = jit(_renamed(function, "serial"))
        self.parallel = numba.njit(parallel=True, **_OPTIONS)(_renamed(function, "parallel"))

    def __call__(self, indptr, *arguments) -> None:
        is_large = indptr.size > 2 and indptr[-1] - indptr[0] >= _ENTRIES_FOR_THREADS
        if is_large and threading.current_thread() is threading.main_thread() and numba.get_num_threads() > 1:
            self.parallel(indptr, *arguments)
        else:
            self.serial(indptr, *arguments)


def row_kernel(function: Callable) -> RowKernel:
    """Compile a loop over ragged rows (first argument ``indptr``), with threads where they pay."""
    return RowKernel(function)


def _renamed(function: Callable, variant: str) -> FunctionType:
    # numba's cache is keyed by name and source, not by options: without this one variant loads the other's code
    function = cast(FunctionType, function)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__module__ = function.__module__
    copy.__qualname__ = f"{function.__qualname__}-{variant}"
    return copy
