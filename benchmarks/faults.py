"""Provoke every fault of ``tests/engine/faults.py``: ``python -m benchmarks.faults [--times 5] [--only NAME]``.

Prints a table: what was lost, whether the resumed curve is that of an undisturbed run, exit codes, processes left over,
and whether the message names the cause.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from engine.faults import CONFIG, FAULTS, SETTINGS, ranks_with_different_directories, suffer, write_parts
from engine.runs import TOY, curve, pretrain

import scllm

COLUMNS = (
    "fault", "times", "steps lost", "largest difference of a resumed loss", "exit codes", "orphans", "cause named",
    "seconds to the end",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", choices=[*FAULTS, "different directories"])
    options = parser.parse_args()
    expected = {from_files: undisturbed(from_files) for from_files in (False, True)}
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in FAULTS if options.only is None else [options.only]:
        if name in FAULTS:
            print(_row(name, options.times, expected[FAULTS[name].from_files]), flush=True)
    if options.only in (None, "different directories"):
        for _ in range(options.times):
            with tempfile.TemporaryDirectory() as folder:
                assert "same step" in ranks_with_different_directories(Path(folder))
        print(f"| ranks with different directories | {options.times} | none: refused | | 1 | 0 | yes | |")


def undisturbed(from_files: bool) -> pd.Series:
    """Losses of a run to which nothing happens."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_parts(Path(folder)) if from_files else scllm.datasets.toy(**TOY)
        pretrain(data, Path(folder) / "run", config=CONFIG, **SETTINGS)
        return curve(Path(folder) / "run").set_index(["split", "step"])["loss"]


def _row(name: str, times: int, expected: pd.Series) -> str:
    fault, outcomes = FAULTS[name], []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(suffer(name, Path(folder)))
    named = [all(re.search(word, outcome.output) for word in fault.cause) for outcome in outcomes]
    differences = [_difference(outcome.resumed, expected) for outcome in outcomes]
    # a step that is left out changes what follows
    said = "left out" if "NaN" in name else f"{max(differences):.1e}"
    return (
        f"| {name} | {times} | {_span([outcome.n_lost for outcome in outcomes])} | {said} | "
        f"{', '.join(map(str, sorted({outcome.exit_code for outcome in outcomes})))} | "
        f"{sum(len(outcome.orphans) for outcome in outcomes)} | {sum(named)} of {times} | "
        f"{_span([round(outcome.seconds) for outcome in outcomes])} |"
    )


def _difference(found: pd.DataFrame, expected: pd.Series) -> float:
    """Largest relative difference of a loss; infinite if steps are missing."""
    found = found.set_index(["split", "step"])["loss"]
    if not found.index.equals(expected.index):
        return float("inf")
    return float(np.abs(found / expected - 1).max())


def _span(numbers: list[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


if __name__ == "__main__":
    main()
