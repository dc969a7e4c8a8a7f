"""When a checkpoint is due: after some steps or some time, or because the process has been told to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from scllm._log import log
from scllm.engine.config import TrainConfig

__all__ = ["Saving"]

# SLURM and other schedulers announce the end of a job with one of these
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Saving:
    """Decides after which steps a run saves a checkpoint.

    After SIGTERM, the run finishes its step, saves a checkpoint, and then lets the signal take its usual effect, which
    is to end the process. After SIGUSR1, it saves a checkpoint and continues.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._steps, self._seconds = config.save_interval()
        self._saved = time.monotonic()
        self._told: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def is_asked(self) -> bool:
        """Whether this rank asks for a checkpoint, which all ranks then save after the same step."""
        return self._told is not None or time.monotonic() - self._saved >= self._seconds

    def is_due(self, step: int) -> bool:
        """Return whether to save after this step in any case."""
        return self._steps is not None and step % self._steps == 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to signals, which only the main thread of a process can do."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            self._restore()

    def saved(self) -> None:
        """Note that a checkpoint has been saved; end the process if it has been told to."""
        self._saved, told, self._told = time.monotonic(), self._told, None
        if told == signal.SIGTERM:
            log.info("ending after SIGTERM, with a checkpoint of this step")
            self._restore()
            os.kill(os.getpid(), told)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._told != signal.SIGTERM:
            self._told = number

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
