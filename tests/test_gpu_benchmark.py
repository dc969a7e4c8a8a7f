"""`python -m benchmarks.gpu` in small on a CPU: all its parts measure, and every number is finite."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("attention", "pretraining", "embedding", "geneformer", "precision", "resume", "performers", "two_ranks")
FAMILIES = {"albert", "geneformer", "gpt2", "scbert", "scfoundation", "scgpt", "xlnet"}


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def numbers(content):
    if isinstance(content, dict):
        for value in content.values():
            yield from numbers(value)
    elif isinstance(content, float):
        yield content


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    # a machine that is shared may be many times slower than the one that the limits are for
    done = run(out, "--seconds", "2000")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_all_parts_measure_and_every_number_is_finite(report):
    assert {name: part["status"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("attention", "pretraining", "embedding", "geneformer", "precision", "resume", "performers", "two_ranks"),
        "done",
    )
    found = list(numbers(report))
    assert len(found) > 200
    assert all(math.isfinite(number) for number in found)
    assert report["machine"]["device"] == "cpu"


@pytest.mark.slow
def test_what_is_known_of_a_cpu_is_found(report):
    cases = {name: part["cases"] for name, part in report["parts"].items()}
    compared = [case for name, case in cases["attention"].items() if "fp32" in name and "time" not in name]
    assert len(compared) == 8
    assert all(error < 1e-5 for case in compared for error in case["ours"].values())
    assert set(cases["precision"]) >= FAMILIES
    assert all(case["bf16_loss"] < 0.05 and case["fp16_loss"] < 0.05 for case in cases["precision"].values())
    resumed = cases["resume"]["killed and resumed"]
    assert resumed["equal"]
    assert resumed["n_losses"] > resumed["killed_after_step"] > 0
    # without a GPU, the verb refuses two and two processes of torchrun train together
    assert cases["two_ranks"]["n_gpus=2"]["refused"]
    assert not cases["two_ranks"]["torchrun, 2 processes, --device cpu"]["refused"]
    assert len(cases["pretraining"]) == 11
    assert all(case["loss_difference"] < 0.02 for name, case in cases["pretraining"].items() if "beside" in name)


def test_parts_without_time_are_skipped_and_said_to_be(tmp_path):
    done = run(tmp_path / "gpu.json", "--seconds", "1", "--parts", "attention,resume")
    assert done.returncode == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {part["status"] for part in parts.values()} == {"skipped"}
    assert all("of 1 s" in part["reason"] for part in parts.values())


def test_a_gpu_that_is_not_there_is_an_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Expected a GPU" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
