"""Measurements that need a new interpreter: peak memory and import time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["call_in_child", "peak_rss", "run_python"]


def run_python(code: str) -> tuple[float, float]:
    """Run one line in a new interpreter; return its wall time and CPU-seconds."""
    before, start = _children_seconds(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start, _children_seconds() - before


def call_in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new interpreter and return its result (numbers and strings)."""
    code = (
        f"import json, sys; from {function.__module__} import {function.__name__} as f; "
        "print(json.dumps(f(*json.loads(sys.argv[1]))))"
    )
    # memory is measured, so it must be returned to the system as in any other process
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)],
        check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def peak_rss() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    # getrusage includes the parent's memory when it started this process, so it is only used without /proc
    with open("/proc/self/status") as file:
        kilobytes = next((int(line.split()[1]) for line in file if line.startswith("VmHWM")), None)
    return (kilobytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
