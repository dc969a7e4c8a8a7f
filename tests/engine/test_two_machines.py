"""Two torchrun launchers on two machines: network namespaces that are joined by a cable and share a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.runs import assert_same_curve, curve, wait_for_step, wait_until

from scllm.engine.run import Run
from scllm.engine.worker import continue_run

ADDRESSES = ("10.77.0.1", "10.77.0.2")
SETTINGS = (
    *("--size", "tiny", "--epochs", "12", "--batch-size", "16", "--dropout", "0", "--validation", "0.1"),
    *("--precision", "fp32", "--device", "cpu"),
)
# without it, a launcher that comes back waits for an address that torch 2.13 publishes only in the first round
RETURNS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _reason() -> str | None:
    """Say why there can be no namespaces here."""
    missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    tried = subprocess.run(["unshare", "-U", "-r", "-n", "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else None


class Machines:
    """Two network namespaces with the addresses above, and launchers in them."""

    def __init__(self) -> None:
        self.holders = [self._hold(["unshare", "-U", "-r", "-n"])]
        self.holders.append(self._hold([*self._on(0), "unshare", "-n"]))
        self._run(0, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", self.holders[1].pid)
        for at, address in enumerate(ADDRESSES):
            self._run(at, "addr", "add", f"{address}/24", "dev", f"cable{at}")
            for device in (f"cable{at}", "lo"):
                self._run(at, "link", "set", device, "up")
        self.launchers: dict[int, subprocess.Popen[str]] = {}

    def _hold(self, command: list[str]) -> subprocess.Popen[bytes]:
        holder = subprocess.Popen([*command, "sleep", "600"])
        name = Path(f"/proc/{holder.pid}/comm")
        wait_until(lambda: holder.poll() is not None or name.read_text() == "sleep\n", seconds=10)
        assert holder.poll() is None
        return holder

    def _on(self, at: int) -> list[str]:
        return ["nsenter", "-t", str(self.holders[at].pid), "-U", "-n", "--preserve-credentials"]

    def _run(self, at: int, *command: object) -> None:
        subprocess.run([*self._on(at), "ip", *map(str, command)], check=True, capture_output=True)

    def start(self, at: int, run_dir: Path, log: Path) -> None:
        """Start the launcher of a machine; the first machine hosts the rendezvous."""
        # no name service knows these machines, so they are told who they are, and that a silent one is gone after 3 s
        known = f"is_host={at == 0},keep_alive_interval=1"
        command = [
            *(*self._on(at), sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", f"--local-addr={ADDRESSES[at]}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:29500", f"--rdzv-conf={known}"),
            *("-m", "scllm", "run", str(run_dir), "--device", "cpu"),
        ]
        with log.open("a") as output:
            self.launchers[at] = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": f"cable{at}", "OMP_NUM_THREADS": "1"} | RETURNS,
            )  # fmt: skip

    def cut_power(self, at: int) -> None:
        """Kill the launcher of a machine; its processes end with it."""
        launcher = self.launchers.pop(at)
        launcher.kill()
        launcher.wait()

    def close(self) -> None:
        for at in list(self.launchers):
            self.cut_power(at)
        for holder in self.holders:
            holder.kill()
            holder.wait()


@pytest.fixture
def machines() -> Iterator[Machines]:
    reason = _reason()
    if reason is not None:
        pytest.skip(f"there can be no network namespaces here: {reason}")
    made = Machines()
    yield made
    made.close()


@pytest.mark.slow
def test_a_machine_that_loses_power_and_comes_back_changes_nothing(toy, machines, tmp_path):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    toy.write_h5ad(tmp_path / "toy.h5ad")
    (tmp_path / "train.toml").write_text("save_every = 3\n")
    given = [tmp_path / "toy.h5ad", "--config", tmp_path / "train.toml", "--run-dir", run_dir, "--write-only"]
    subprocess.run([sys.executable, "-m", "scllm", "pretrain", *given, *SETTINGS], check=True, capture_output=True)
    shutil.copytree(run_dir, whole)
    continue_run(Run(whole), device="cpu")

    logs = [tmp_path / f"log{at}.txt" for at in (0, 1)]
    for at, log in enumerate(logs):
        machines.start(at, run_dir, log)
    wait_for_step(run_dir, 10)
    machines.cut_power(1)
    assert not Run(run_dir).is_done
    machines.start(1, run_dir, logs[1])
    for at, log in enumerate(logs):
        assert machines.launchers[at].wait(timeout=300) == 0, log.read_text()
    assert Run(run_dir).is_done
    assert "resuming at step" in "".join(log.read_text() for log in logs)
    assert_same_curve(curve(run_dir), curve(whole))
