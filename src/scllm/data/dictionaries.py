"""Published dictionaries of tokens, medians and ids: JSON, or pickles that are read without executing code."""

from __future__ import annotations

import gzip
import json
import pickle
import zlib
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["read_dictionary", "read_whole"]

# the only classes that a pickled dictionary of strings and numbers needs, including those of numpy's numbers
_PLAIN = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Allow only the classes of strings and numbers; built-in containers need no class."""
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def read_dictionary(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a dictionary of strings and numbers from JSON or a pickle, which may be compressed with gzip.

    Raises ``ValueError`` if a pickle contains anything else. No code in it is executed.
    """
    path = Path(path)
    raw = read_whole(path, "a dictionary (.json, .json.gz, .pkl)")
    try:
        content = _PlainUnpickler(BytesIO(raw)).load() if raw[:1] == b"\x80" else json.loads(raw)
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        AttributeError,
        IndexError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ValueError(
            f"Expected a dictionary of strings and numbers in {path} (JSON or a pickle), but it cannot be read "
            f"({error}). The file is truncated or damaged, or holds code, which is never executed: download it again, "
            "or save it as JSON."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a dictionary in {path}, got a {type(content).__name__}. Pass another file.")
    return {str(key): value.item() if hasattr(value, "item") else value for key, value in content.items()}


def read_whole(path: Path, what: str) -> bytes:
    """Read the bytes of a file, decompressed if it is a gzip file; ``what`` describes the file in messages."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected {what} at {path}, but there is no such file. Check the path.")
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"Expected a complete gzip file at {path}, but it cannot be unpacked ({error}). It is truncated or "
                "damaged: download it again."
            ) from error
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"Expected {what} at {path}, got a git-lfs pointer to a large file. Fetch the file itself: run "
            "`git lfs pull` in its repository, or download it again."
        )
    return raw
