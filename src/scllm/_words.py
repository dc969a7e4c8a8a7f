"""Write times and sizes in words, roughly, because they are estimates."""

from __future__ import annotations

__all__ = ["size_in_words", "time_in_words"]


def time_in_words(seconds: float) -> str:
    """Write a time roughly: ``a few seconds``, ``about 40 s``, ``about 3 min``, ``about 2.5 h``.

    Examples
    --------
    >>> time_in_words(170)
    'about 3 min'
    """
    if seconds < 10:
        return "a few seconds"
    if seconds < 95:
        return f"about {round(seconds, -1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def size_in_words(n_bytes: float) -> str:
    """Write a size in MB or GB.

    Examples
    --------
    >>> size_in_words(2_340_000_000)
    '2.3 GB'
    """
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"
