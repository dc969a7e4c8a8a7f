"""A watch for classifiers that answer one class to every cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scllm._log import warn

__all__ = ["watching"]


def watching(track: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """``track``, and a warning after the first epoch where one label was the answer to all cells.

    A line of the history has the share of cells that got the commonest answer; it must be all of the validation cells
    and all of the last training step's, as a few cells may well be alike.
    """
    before: Mapping[str, Any] = {}

    def watch(line: dict[str, Any]) -> None:
        nonlocal before
        track(line)
        if line["split"] == "validation" and line["epoch"] == 0 and line["step"]:
            for name in line:
                if name.startswith("commonest_answer") and line[name] == before.get(name) == 1:
                    _warn(name)
        before = line

    return watch


def _warn(name: str) -> None:
    warn(
        f"after the first epoch the model gives one label to all cells ({name} = 1), several expected. Try a lower lr, "
        "upsample=True, class_weight='balanced', or loss={'ce': 1, 'dice': 1}."
    )
