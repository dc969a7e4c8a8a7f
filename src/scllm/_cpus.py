"""How many CPUs this process may use: fewer than the machine has, on a cluster and in a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_quota", "n_cpus"]


def n_cpus() -> int:
    """Return the number of CPUs that this process may use: those of its affinity, within the quota of its cgroup."""
    # schedulers set the affinity; macOS has none
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    # more threads than whole CPUs would be stopped for a part of the time, and let the others wait
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return how many CPUs' time a container or job may use, of cgroups version 2 or 1; ``None``: there is no limit."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    quotas = [
        quota for line in lines for folder, version in _folders(line, mounted) if (quota := _quota(folder, version))
    ]
    return min(quotas, default=None)


def _folders(line: str, mounted: Path) -> Iterator[tuple[Path, int]]:
    """Yield the folders of a cgroup and of all groups around it, which limit it too, with the version."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    root = mounted / controllers if controllers else mounted
    inner = Path(path.lstrip("/"))
    for folder in (inner, *inner.parents):
        yield root / folder, 1 if controllers else 2


def _quota(folder: Path, version: int) -> float | None:
    """Read the quota of one folder; ``None`` without one, and for folders that the container does not show."""
    try:
        if version == 2:
            most, period = (folder / "cpu.max").read_text().split()
        else:
            most, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(most) / int(period) if int(most) > 0 else None
    except (OSError, ValueError):  # version 2 has the word "max"
        return None
