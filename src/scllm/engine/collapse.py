"""A watch for classifiers that answer one class to every cell."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["warn_of_collapse"]


def warn_of_collapse(line: Mapping[str, Any]) -> None:
    """Warn after the first epoch where one label was the answer to all validation cells; of other lines do nothing.

    ``line`` is one of the history: ``commonest_answer`` is the share of cells that got the label given most often.
    """
    if line["split"] != "validation" or line["epoch"] > 0 or not line["step"]:
        return
    for name, share in line.items():
        if name.startswith("commonest_answer") and share == 1:
            warnings.warn(
                f"after the first epoch the model gives one label to all validation cells ({name} = 1), several "
                "expected. Try a lower lr, upsample=True, class_weight='balanced', or loss={'ce': 1, 'dice': 1}.",
                UserWarning,
                stacklevel=2,
            )
