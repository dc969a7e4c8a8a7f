"""Match a message by the values that it names, whatever the words around them."""

from __future__ import annotations

import re

__all__ = ["naming"]


def naming(*values: object) -> str:
    """Make a pattern for `pytest.raises(match=)` that finds all values as whole words, in any order."""
    return "(?s)" + "".join(f"(?=.*{_whole(str(value))})" for value in values)


def _whole(value: str) -> str:
    # 65 is neither in 650 nor in 0.65
    before = r"(?<![\w.])" if value[0].isdigit() else r"(?<!\w)" if value[0].isidentifier() else ""
    after = r"(?!\w)" if value[-1].isalnum() or value[-1] == "_" else ""
    return before + re.escape(value) + after
