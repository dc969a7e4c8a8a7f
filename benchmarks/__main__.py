"""Run the benchmarks and print the performance table: ``python -m benchmarks [--rows 1,3]``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks._timing import Row, copy_rate, gemm_rate
from scllm._cpus import n_cpus

# Freed memory stays with the process, for both sides of a comparison: on a virtual machine, returning it and getting it
# again took three quarters of a training step.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_ARENA_MAX": "1"}

COLUMNS = (
    "row", "what", "compared with", "ratio, median [min, max]", "absolute", "share of the upper limit", "target", "met"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rows", help="numbers of the rows to run, such as 1,3 (default: all)")
    chosen = parser.parse_args().rows
    numbers = None if chosen is None else {int(number) for number in chosen.split(",")}

    print(f"{_machine()}: copy {copy_rate() / 1e9:.1f} GB/s, GEMM {gemm_rate() / 1e9:.0f} GFLOP per CPU-second\n")
    print(_line(COLUMNS))
    print(_line(["---"] * len(COLUMNS)))
    for name in _modules(numbers):
        for row in _rows(importlib.import_module(f"benchmarks.{name}").run()):
            print(_line(_cells(row)), flush=True)


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.open() if "model name" in line] if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {n_cpus()} cores, Python {platform.python_version()}"


def _modules(numbers: set[int] | None) -> list[str]:
    """Return the names of the row modules; ``row01_binning`` is row 1."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("row[0-9][0-9]_*.py"))
    return [name for name in names if numbers is None or int(name[3:5]) in numbers]


def _rows(result: Row | Iterable[Row]) -> list[Row]:
    return [result] if isinstance(result, Row) else list(result)


def _cells(row: Row) -> list[str]:
    met = {True: "yes", False: "NO", None: "not measured"}[row.is_met]
    return [str(row.number), row.what, row.beside, row.ratio, row.absolute, row.share_of_roof, row.target, met]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():
        # the allocator reads these variables only when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], os.environ | ALLOCATOR)
    main()
