"""Files of run and model directories that need no torch: JSON, written atomically, and the training history."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

import pandas as pd

__all__ = [
    "append_history",
    "cut_history",
    "read_history",
    "read_json",
    "read_ledger",
    "read_report",
    "write_json",
    "write_report",
    "write_text",
]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader finds either the old file or the complete new one."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(content, indent=1))


def read_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text())


def append_history(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a history file, one JSON object per line."""
    with path.open("a") as handle:
        handle.write("".join(json.dumps(line) + "\n" for line in lines))


def cut_history(path: Path, step: int) -> None:
    """Drop the lines after a step and an incomplete last line, so that a resumed run logs no step twice."""
    if path.is_file():
        with path.open("r+b") as history:
            # one system call, before which and after which the file is a history, whenever this process is killed
            history.truncate(_end_of_step(history, step))


def read_history(path: Path) -> pd.DataFrame | None:
    """Read the history as a table with one row per logged step; ``None`` if there is no history."""
    if not path.is_file():
        return None
    written = path.read_bytes()
    # the end of a line that is being written, or of a process that was killed, is missing
    whole = written[: written.rfind(b"\n") + 1].rstrip()
    # parsed as one array, which takes half as long as line by line
    return pd.DataFrame(json.loads(b"[" + whole.replace(b"\n", b",") + b"]")) if whole else None


def write_report(path: Path, report: pd.DataFrame) -> None:
    """Write the report of a compression; figures that were not measured become ``null``."""
    rows = report.astype(object).where(report.notna(), None)
    write_json(path, rows.to_dict("index"))


def read_report(path: Path) -> pd.DataFrame | None:
    """Read the report of a compression, with one row before and one after it; ``None`` if there is no report."""
    if not path.is_file():
        return None
    report = pd.DataFrame.from_dict(read_json(path), orient="index")
    return report.astype({name: float for name in report if report[name].dtype == object})


def read_ledger(path: Path) -> pd.DataFrame | None:
    """Read the data sets and donors that a model was trained on; ``None`` if they are not known."""
    return pd.DataFrame(read_json(path)) if path.is_file() else None


def _end_of_step(history: IO[bytes], step: int) -> int:
    """Return the byte at which the lines up to a step end, by bisection, because steps ascend."""
    # the lines before `kept`, where a line begins, are kept; no line that is kept begins at `end` or later
    kept, end = 0, history.seek(0, os.SEEK_END)
    while kept < end:
        middle = (kept + end) // 2
        history.seek(max(middle - 1, 0))
        if middle:
            history.readline()  # the first line that begins at `middle` or later is judged
        begin = history.tell()
        if begin >= end:
            end = middle
            continue
        line = history.readline()
        if line.endswith(b"\n") and json.loads(line)["step"] <= step:
            kept = history.tell()
        else:
            end = begin
    return kept
