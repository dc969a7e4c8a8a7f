"""Detection of classifiers that predict the same class for every cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scllm._log import warn
from scllm.data.run_files import read_history

__all__ = ["CollapseWatch"]

_N_STEPS = 3  # last training steps to check, because the cells of one step may well share a label


class CollapseWatch:
    """Warn once, after the first epoch, if one label is predicted for all cells.

    Each line of the history contains the share of cells with the most frequent prediction. For a warning, this share
    must be 1 in the validation cells (if there are any) and in the last training steps. Some of these predictions must
    be wrong, because one label may be so common that these cells have no other. A head without labelled cells in one of
    these lines is not judged, because any model can predict the same label for one or two cells.

    Parameters
    ----------
    history
        History file, written by this process or by others.
    """

    def __init__(self, history: Path) -> None:
        self.history = history
        self.has_looked = False

    def look(self, line: Mapping[str, Any] | None) -> None:
        """Judge the first epoch as soon as a line of the second epoch is written."""
        if line is not None and line["epoch"] > 0:
            self.finish()

    def finish(self) -> None:
        """Judge the first epoch, unless this has been done already."""
        table = None if self.has_looked else read_history(self.history)
        if table is None:
            return
        self.has_looked = True
        table = table[(table["epoch"] == 0) & (table["step"] > 0)]
        parts = [part.tail(_N_STEPS) for _, part in table.groupby("split")]
        for name in table.columns[table.columns.str.startswith("commonest_answer")]:
            accuracy = name.replace("commonest_answer", "accuracy", 1)
            is_one_answer = all((part[name] == 1).all() for part in parts)
            if is_one_answer and any((part[accuracy] < 1).any() for part in parts):
                warn(
                    f"After the first epoch, the model predicts one label for all cells ({name} = 1). Try a lower lr, "
                    "upsample=True, class_weight='balanced', or loss={'ce': 1, 'dice': 1}."
                )
