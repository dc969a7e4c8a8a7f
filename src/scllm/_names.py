"""Format lists of names for messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["listed"]

_SHOWN = 8


def listed(names: Iterable[object], *, quoted: bool = True) -> str:
    """List the first few names, and say how many more there are.

    Examples
    --------
    >>> listed("abc")
    "'a', 'b', 'c'"
    >>> listed(range(20), quoted=False)
    '0, 1, 2, 3, 4, 5, 6, 7 and 12 more'
    """
    texts = [repr(name) if quoted else str(name) for name in names]
    rest = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + rest or "none"
