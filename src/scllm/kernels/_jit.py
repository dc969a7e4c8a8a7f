"""The numba options of all kernels.

Compiled code is kept between processes: in the directory that ``NUMBA_CACHE_DIR`` names, or beside the source, or (if
the package directory is not writable) in the user's cache directory. A kernel is compiled again when its file changes,
but not when a kernel that it calls changes in another file: delete ``kernels/__pycache__`` after editing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, cast

import numba
from numba.core import config, event

from scllm._cpus import n_cpus
from scllm._log import log

__all__ = ["RowKernel", "jit", "row_kernel"]

# fastmath stays off, because bins and ranks must equal those of numpy to the last bit
_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy"}

# with fewer entries than this, starting threads takes longer than they save
_ENTRIES_FOR_THREADS = 200_000


def jit(function: Callable) -> Callable:
    """Compile for one thread, without the GIL."""
    return _compiled(function)


def _compiled(function: Callable, **options: Any) -> Any:
    """Compile on the first call, and cache the result if numba finds a directory that is writable."""
    kernel = numba.njit(**_OPTIONS, **options)(function)
    try:
        kernel.enable_caching()
    except RuntimeError:  # neither the package nor the user's cache directory is writable
        _SayOnce.advice = "in every process: set NUMBA_CACHE_DIR to a directory where they can be kept"
    return kernel


class _SayOnce(event.Listener):
    """Logs once that kernels are being compiled, which makes the first call slow."""

    advice: ClassVar[str] = "once"

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: event.Event) -> None:
        """Log that a kernel of scllm is compiled instead of read from the cache."""
        module = event.data["dispatcher"].py_func.__module__
        if not self.said and module.startswith("scllm."):
            self.said = True
            # never logged as a detail, because the first function that is called takes this long
            log.log(logging.INFO, "compiling numba kernels used for the first time (up to about 20 s), %s", self.advice)

    def on_end(self, event: event.Event) -> None:
        """Log nothing when compilation ends."""


event.register("numba:compile", _SayOnce())


class RowKernel:
    """A kernel over ragged rows, compiled with and without threads.

    The first argument is ``indptr``. The outer loop is a ``numba.prange`` whose iterations are independent, so that
    both variants and any number of threads give the same result. Threads are used only for large inputs and from the
    main thread: numba's built-in thread pool aborts the process when two threads enter it, and a loader thread should
    not compete with the model for the cores. ``numba.set_num_threads`` and ``NUMBA_NUM_THREADS`` limit the threads;
    without either, processes that torchrun started share the CPUs.
    """

    def __init__(self, function: Callable) -> None:
        self.serial = jit(_renamed(function, "serial"))
        self.parallel = _compiled(_renamed(function, "parallel"), parallel=True)

    def __call__(self, indptr, *arguments) -> None:
        is_large = indptr.size > 2 and indptr[-1] - indptr[0] >= _ENTRIES_FOR_THREADS
        if is_large and threading.current_thread() is threading.main_thread() and _n_threads() > 1:
            self.parallel(indptr, *arguments)
        else:
            self.serial(indptr, *arguments)


def row_kernel(function: Callable) -> RowKernel:
    """Compile a loop over ragged rows (first argument ``indptr``), which uses threads for large inputs."""
    return RowKernel(function)


def _n_threads() -> int:
    """Return the number of threads of numba, which starts them when it is first asked.

    numba's OpenMP layer then sets the number of threads of torch too, which shares its OpenMP library. Processes that
    were started with one thread each would compete for the cores and be many times slower.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return _shared_threads()
    before = torch.get_num_threads()
    n_threads = _shared_threads()
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
    return n_threads


def _shared_threads() -> int:
    """Return the number of threads of numba, lowered to this process's share of the CPUs unless someone has set it."""
    n_threads = numba.get_num_threads()
    if "NUMBA_NUM_THREADS" in os.environ or n_threads != config.NUMBA_NUM_THREADS:  # type: ignore[attr-defined]
        return n_threads
    share = max(1, n_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if share < n_threads:
        numba.set_num_threads(share)
    return min(share, n_threads)


def _renamed(function: Callable, variant: str) -> FunctionType:
    # numba's cache is keyed by name and source but not by options, so the variants would load each other's code
    function = cast(FunctionType, function)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copy.__module__ = function.__module__
    copy.__qualname__ = f"{function.__qualname__}-{variant}"
    return copy
