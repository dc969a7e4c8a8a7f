"""CPUs of a process, from its affinity and from cgroups of both versions."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import pytest

from scllm import _cpus
from scllm._cpus import cpu_quota, n_cpus
from scllm.kernels import _jit


@pytest.fixture
def cgroup(tmp_path):
    """Files as the kernel shows them: the process's groups, and limits by folder."""

    def write(own, limits):
        (tmp_path / "cgroup").write_text(own)
        for name, text in limits.items():
            file = tmp_path / "mounted" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return cpu_quota(tmp_path / "cgroup", tmp_path / "mounted")

    return write


def test_version_2_in_a_container(cgroup):
    assert cgroup("0::/\n", {"cpu.max": "250000 100000\n"}) == 2.5


def test_the_tightest_group_around_the_process_counts(cgroup):
    limits = {
        "jobs/7/step/cpu.max": "max 100000\n",
        "jobs/7/cpu.max": "400000 100000\n",
        "jobs/cpu.max": "max 100000\n",
    }
    assert cgroup("0::/jobs/7/step\n", limits) == 4


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_version_1(cgroup, controllers):
    limits = {f"{controllers}/cpu.cfs_quota_us": "300000\n", f"{controllers}/cpu.cfs_period_us": "100000\n"}
    own = f"4:memory:/docker/12\n3:{controllers}:/docker/12\n0::/docker/12\n"
    assert cgroup(own, limits) == 3


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}),
        ("2:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000\n", "cpuset/cpu.cfs_period_us": "100000\n"}),
        ("", {}),
    ],
)
def test_no_limit(cgroup, own, limits):
    assert cgroup(own, limits) is None


def test_without_cgroups_there_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path / "none") is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 6), (2.5, 2), (0.5, 1), (16.0, 6)])
def test_affinity_and_quota_both_count(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(_cpus, "cpu_quota", lambda: quota)
    assert n_cpus() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has affinities")
def test_a_process_on_one_cpu_has_one():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from scllm._cpus import n_cpus; print(n_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


KERNEL = "import os; from scllm.kernels import _jit; import numba; _jit._n_threads(); print(numba.get_num_threads())"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, n_cpus()),
        ({"LOCAL_WORLD_SIZE": str(n_cpus())}, 1),
        ({"LOCAL_WORLD_SIZE": "1000"}, 1),
        ({"LOCAL_WORLD_SIZE": "1000", "NUMBA_NUM_THREADS": "2"}, 2),
    ],
)
def test_processes_of_torchrun_share_the_cores_for_kernels(environment, expected):
    clean = {name: value for name, value in os.environ.items() if name not in ("NUMBA_NUM_THREADS", "LOCAL_WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], capture_output=True, text=True, check=True, env=clean | environment
    )
    assert int(done.stdout) == expected


def test_threads_that_the_caller_set_stay():
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert _jit._n_threads() == 1
    finally:
        numba.set_num_threads(before)
