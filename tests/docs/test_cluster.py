"""The scripts for clusters: their syntax, their options, and what the SLURM script does with a real run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engine.runs import wait_for_step
from torch.distributed.run import get_args_parser

from scllm.data.run_files import read_history
from scllm.datasets import toy
from scllm.engine.launch import cluster_command

DOCS = Path(__file__).parents[2] / "docs"
SLURM, TRAINJOB = DOCS / "cluster" / "slurm.sh", DOCS / "cluster" / "trainjob.yaml"
RUN_DIR = "/shared/runs/blood"


def of_slurm() -> str:
    (command,) = re.findall(r"^ *(torchrun (?:.*\\\n)*.*)", SLURM.read_text(), re.MULTILINE)
    return command.replace("\\\n", " ").removesuffix("&").replace('"$run_dir"', RUN_DIR)


def of_kubernetes() -> str:
    (script,) = yaml.safe_load(TRAINJOB.read_text())["spec"]["trainer"]["args"]
    return script.removeprefix("exec ")


def of_the_page() -> list[str]:
    text = (DOCS / "cluster.md").read_text().replace("\\\n", " ")
    return re.findall(r"^ *(torchrun .*)", text, re.MULTILINE)


@pytest.mark.parametrize("command", [of_slurm(), of_kubernetes(), *of_the_page()])
def test_commands_are_the_one_that_the_command_line_prints(command: str) -> None:
    """Apart from names that the scheduler knows, and from restarts."""
    values = {"--nnodes": "NODES", "--nproc-per-node": "8"}
    words = []
    for word in shlex.split(command):
        option, _, value = word.partition("=")
        if option in ("--max-restarts", "--rdzv-id"):
            continue
        if option == "--rdzv-endpoint":
            word = f"{option}=HOST:{value.rpartition(':')[2]}"
        words.append(f"{option}={values[option]}" if option in values else word)
    assert words == shlex.split(cluster_command(RUN_DIR, 8))


@pytest.mark.parametrize("command", [of_slurm(), of_kubernetes(), *of_the_page()])
def test_options_are_those_of_torchrun(command: str) -> None:
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    options = {word.partition("=")[0] for word in shlex.split(command) if word.startswith("--")}
    assert {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"} <= options <= known


def test_slurm_script_is_without_findings() -> None:
    assert subprocess.run(["bash", "-n", SLURM], check=False).returncode == 0
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run([found, SLURM], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_train_job_mounts_the_folder_of_the_run() -> None:
    job = yaml.safe_load(TRAINJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    ((volume,), (container,)) = pod["volumes"], pod["containers"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/shared"}]


@pytest.fixture
def scheduler(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one machine; `srun` starts a program, and `scontrol requeue` leaves a note."""
    programs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
        "scontrol": 'if [[ $1 == requeue ]]; then echo "$2" >> requeued; else echo localhost; fi\n',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    return os.environ | job | {"PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_slurm_job_saves_before_its_time_limit_and_resumes(scheduler: dict[str, str], tmp_path: Path) -> None:
    toy(n_cells=120, n_genes=40).write_h5ad(tmp_path / "toy.h5ad")
    run, options = tmp_path / "run", ["--size", "tiny", "--device", "cpu", "--batch-size", "16", "--epochs", "30"]
    write = [
        sys.executable,
        "-m",
        "scllm",
        "pretrain",
        tmp_path / "toy.h5ad",
        *options,
        "--run-dir",
        run,
        "--write-only",
    ]
    subprocess.run(write, check=True, capture_output=True)
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(["bash", SLURM, run], env=scheduler, cwd=tmp_path, stdout=log, stderr=log)
        wait_for_step(run, 10)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=60) == 0, (tmp_path / "log").read_text()
        assert (tmp_path / "requeued").read_text() == "7\n"
        assert not (run / "done").exists()
        stopped = read_history(run / "history.jsonl")["step"].max()
        again = subprocess.run(["bash", SLURM, run], env=scheduler, cwd=tmp_path, stdout=log, stderr=log, timeout=120)
    text = (tmp_path / "log").read_text()
    assert again.returncode == 0, text
    assert "ending after SIGTERM, with a checkpoint of this step" in text
    assert f"resuming at step {stopped}" in text
    assert (run / "done").exists()
    assert (tmp_path / "requeued").read_text() == "7\n"
