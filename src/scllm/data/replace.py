"""Writing a file or folder to a temporary place first, and renaming it once it is complete."""

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
    """Yield a path in a hidden folder to write to, and rename the result to ``path`` afterwards.

    The old content of ``path`` is kept until then, and is kept for good if an error is raised. If ``path`` is a link,
    its target is replaced.
    """
    path = Path(os.path.realpath(path))
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    fresh, old = hidden / path.name, hidden / "old"
    try:
        yield fresh
        if fresh.is_dir() and path.exists():
            # a folder cannot be renamed to the path of another one
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
