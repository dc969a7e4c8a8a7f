"""Files of run and model directories that need no torch: JSON, written atomically, and the training history."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
    """Drop the lines after a step, so that a resumed run logs no step twice."""
    if path.is_file():
        kept = [line for line in _whole_lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def read_history(path: Path) -> pd.DataFrame | None:
    """Read the history as a table with one row per logged step; ``None`` if there is no history."""
    if not path.is_file():
        return None
    lines = _whole_lines(path)
    return pd.DataFrame(lines) if lines else None


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


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    # a process that was killed may leave an incomplete last line
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
