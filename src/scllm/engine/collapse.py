"""A watch for classifiers that answer one class to every cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scllm._log import warn
from scllm.data.run_files import read_history

__all__ = ["CollapseWatch"]

_LOOKED_AT = 3  # training steps: cells of one may well be alike


class CollapseWatch:
    """Warns once, when the first epoch is over, where one label was the answer to all cells.

    A line of the history has the share of cells that got the commonest answer; it must be all of the validation cells,
    where there are any, and all of the last training steps', and wrong for some: a label may be so common that no other
    is among these cells. A head without a labelled cell in one of these lines is not judged: a single cell or two get
    one answer from any model.

    Parameters
    ----------
    history
        File that lines are written to, by this process or by others.
    """

    def __init__(self, history: Path) -> None:
        self.history = history
        self.has_looked = False

    def look(self, line: Mapping[str, Any] | None) -> None:
        """Judge the first epoch once the last line is one of the second."""
        if line is not None and line["epoch"] > 0:
            self.finish()

    def finish(self) -> None:
        """Judge the first epoch, unless that was done."""
        table = None if self.has_looked else read_history(self.history)
        if table is None:
            return
        self.has_looked = True
        table = table[(table["epoch"] == 0) & (table["step"] > 0)]
        parts = [part.tail(_LOOKED_AT) for _, part in table.groupby("split")]
        for name in table.columns[table.columns.str.startswith("commonest_answer")]:
            accuracy = name.replace("commonest_answer", "accuracy", 1)
            is_one_answer = all((part[name] == 1).all() for part in parts)
            if is_one_answer and any((part[accuracy] < 1).any() for part in parts):
                warn(
                    f"after the first epoch the model gives one label to all cells ({name} = 1), several expected. "
                    "Try a lower lr, upsample=True, class_weight='balanced', or loss={'ce': 1, 'dice': 1}."
                )
