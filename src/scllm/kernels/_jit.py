"""The one place where numba options are set.

Compiled code is kept between processes: in the directory that ``NUMBA_CACHE_DIR`` names, else beside the source, else
(where the package may not be written) in the user's cache directory. It is renewed when the file of the kernel changes.
A kernel that calls another file's is not renewed by a change there: delete ``kernels/__pycache__`` after editing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, cast

import numba
from numba.core import event

from scllm._log import log

__all__ = ["RowKernel", "jit", "row_kernel"]

# fastmath stays off: bins and ranks must be those of numpy to the last bit
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy"}

# below this many entries starting threads costs more than they save
_ENTRIES_FOR_THREADS = 200_000


def jit(function: Callable) -> Callable:
    """Compile for one thread, without the GIL."""
    return _compiled(function)


def _compiled(function: Callable, **options: Any) -> Any:
    """Compile when first called, and keep the result where numba finds a directory to write."""
    kernel = numba.njit(**_OPTIONS, **options)(function)
    try:
        kernel.enable_caching()
    except RuntimeError:  # neither the package nor the user's cache directory may be written
        _SayOnce.advice = "in every process: set NUMBA_CACHE_DIR to a directory where they can be kept"
    return kernel


class _SayOnce(event.Listener):
    """Explains why the first call takes long, where it does."""

    advice: ClassVar[str] = "once"

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: event.Event) -> None:
        """A kernel is compiled, and not read from the cache; other packages' kernels say nothing."""
        module = event.data["dispatcher"].py_func.__module__
        if not self.said and module.startswith("scllm."):
            self.said = True
            # not as a detail: whichever verb calls first takes that long
            log.log(logging.INFO, "compiling numba kernels for this machine (about 20 s), %s", self.advice)

    def on_end(self, event: event.Event) -> None:
        """Nothing is left to say."""


event.register("numba:compile", _SayOnce())


class RowKernel:
    """A kernel over ragged rows, compiled with and without threads.

    The first argument is ``indptr``; the outer loop is a ``numba.prange`` whose turns do not depend on each other, so
    that both variants and any number of threads give the same result. Threads are used on large inputs and from the
    main thread only: numba's built-in thread pool aborts the process when two threads enter it, and a loader thread
    should not compete with the model for the cores. ``numba.set_num_threads`` and ``NUMBA_NUM_THREADS`` limit them.
    """

    def __init__(self, function: Callable) -> None:
        self.serial = jit(_renamed(function, "serial"))
        self.parallel = _compiled(_renamed(function, "parallel"), parallel=True)

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
