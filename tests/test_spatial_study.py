"""`python -m benchmarks.spatial_her2st` in small: every part trains on simulated sections and writes its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_part_of_the_comparison_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.spatial_her2st", str(tmp_path), "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = {
        path.stem: pd.read_csv(path).set_index("arm") for path in tmp_path.glob("*.csv") if "fits" not in path.stem
    }
    assert set(tables) == {"gpt2", "scgpt", "weight_1", "one_section", "pixels"}
    assert set(tables["gpt2"].index) >= {
        "mean",
        "ridge",
        "knn",
        "none",
        "random",
        "permuted",
        "feature",
        "match",
        "nll",
    }
    # two sections, each held out once with one seed
    assert (pd.concat(tables)["n_fits"] == 2).all()
    predictors = pd.concat(tables).drop(index="mean", level="arm")
    assert predictors[["pcc", "correlation_error", "auroc_real"]].notna().all(axis=None)
    # the parts share trainings
    assert tables["gpt2"].loc["none", "pcc"] == tables["weight_1"].loc["none", "pcc"]
