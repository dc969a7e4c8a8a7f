"""Writing a file or folder beside its place, and renaming it there when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced_when_whole"]


@contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """A path to write to in a hidden folder; what is there afterwards takes the place of ``path`` by a rename.

    What was at ``path`` stays until then, and for good where an error is raised. A link is followed, not replaced.
    """
    path = Path(os.path.realpath(path))
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    fresh, old = hidden / path.name, hidden / "old"
    try:
        yield fresh
        if fresh.is_dir() and path.exists():
            # a folder cannot be renamed over another
            path.rename(old)
            try:
                fresh.rename(path)
            except BaseException:
                old.rename(path)
                raise
        else:
            fresh.replace(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
