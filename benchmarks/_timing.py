"""Paired timings in CPU-seconds: both programs alternate in one run, next to the machine's upper limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np

__all__ = ["Ratio", "Row", "copy_rate", "cpu_seconds", "gemm_rate", "in_turns", "one_torch_thread", "paired"]

ROUNDS = 7

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """Their seconds divided by our seconds in each round; above 1, ours is faster."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> np.ndarray:
        return np.array(self.theirs) / np.array(self.ours)

    @property
    def median(self) -> float:
        return float(np.median(self.ratios))

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.ratios.min():.3g}, {self.ratios.max():.3g}]"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    number: int
    what: str
    beside: str
    ratio: str
    absolute: str
    share_of_roof: str
    target: str
    is_met: bool | None  # None: not measured on this machine


def cpu_seconds(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Measure the CPU-seconds of one call, over all threads of the process."""
    start = clock()
    function()
    return clock() - start


def paired(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    n_ours: int = 1,
    n_theirs: int = 1,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> Ratio:
    """Time two functions alternately (A B A B ...).

    Parameters
    ----------
    ours, theirs
        Functions to time. Both must have run before, so that nothing is compiled here, and their results compared.
    n_ours, n_theirs
        Units of work per call; seconds are given per unit. The faster function should get more units.
    rounds
        Number of pairs, at least 5.
    clock
        Clock to read: CPU-seconds of the process, or ``time.perf_counter`` to compare threads or processes.
    """
    seconds = [(cpu_seconds(ours, clock) / n_ours, cpu_seconds(theirs, clock) / n_theirs) for _ in range(rounds)]
    return Ratio(*zip(*seconds, strict=True))


def one_torch_thread(function: Callable[P, T]) -> Callable[P, T]:
    """Limit torch to one thread during a call, because threads that wait for each other use CPU-seconds."""

    @wraps(function)
    def on_one(*args: P.args, **kwargs: P.kwargs) -> T:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(before)

    return on_one


def in_turns(functions: Sequence[Callable[[], object]], *, rounds: int = 5) -> list[tuple[float, ...]]:
    """Measure the CPU-seconds of several functions alternately, to compare several with one slow function."""
    return list(zip(*([cpu_seconds(function) for function in functions] for _ in range(rounds)), strict=True))


@cache
def copy_rate() -> float:
    """Measure the bytes per CPU-second that one thread copies, reads plus writes, in arrays larger than the caches."""
    source = np.ones(1 << 24)
    target = np.empty_like(source)
    seconds = [cpu_seconds(lambda: np.copyto(target, source)) for _ in range(5)]
    return 2 * source.nbytes / float(np.median(seconds[1:]))


@cache
def gemm_rate(n: int = 1536) -> float:
    """Measure float32 operations per CPU-second of numpy's matrix product, over all its threads."""
    a = np.ones((n, n), np.float32)
    seconds = [cpu_seconds(lambda: a @ a) for _ in range(5)]
    return 2 * n**3 / float(np.median(seconds[1:]))
