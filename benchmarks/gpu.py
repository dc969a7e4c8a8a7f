"""Measure everything that needs a GPU, in less than six minutes: ``python -m benchmarks.gpu --out gpu.json``.

Each part runs in a process of its own with a limit of time, so that a crash or a part that hangs ends this part alone.
The JSON is complete after every part. ``--device cpu --tiny`` runs the same code on small sizes, as a test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from benchmarks._gpu_cases import FULL, TINY, Cases, write_json

__all__ = ["PARTS", "main"]

# name -> module with a function of that name, and its seconds when all parts have TOTAL; the most important first
PARTS = {
    "attention": ("benchmarks._gpu_checks", 35),
    "pretraining": ("benchmarks._gpu_rows", 90),
    "embedding": ("benchmarks._gpu_rows", 35),
    "geneformer": ("benchmarks._gpu_rows", 35),
    "precision": ("benchmarks._gpu_checks", 30),
    "resume": ("benchmarks._gpu_checks", 45),
    "performers": ("benchmarks._gpu_rows", 30),
    "two_ranks": ("benchmarks._gpu_checks", 55),
}
TOTAL = 345  # seconds; parts seldom need all of theirs, so the last ones have time too
# seconds that a part needs to start, and before its end for its last case
_START, _END = 5, 3


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after the other; return 1 if one of them is not complete."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test the code")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file (default: gpu.json)")
    parser.add_argument("--parts", help="names of parts to run, such as attention,resume (default: all)")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"time for all parts (default: {TOTAL})")
    options = parser.parse_args(arguments)
    names = list(PARTS) if options.parts is None else options.parts.split(",")
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        parser.error(f"Expected parts out of {', '.join(PARTS)}, got {unknown[0]!r}.")
    return _run_all(names, options)


def _run_all(names: list[str], options: argparse.Namespace) -> int:
    began = time.monotonic()
    context = _context(options.device)
    report: dict[str, Any] = {"machine": _machine(options.device), "tiny": options.tiny, "parts": {}}
    write_json(options.out, report)
    for name in names:
        left = options.seconds - (time.monotonic() - began)
        limit = min(PARTS[name][1] * options.seconds / TOTAL, left)
        if limit < _START + _END:
            part: dict[str, Any] = {"status": "skipped", "reason": f"{left:.0f} s were left of {options.seconds:.0f} s"}
        else:
            print(f"{name} (up to {limit:.0f} s)", file=sys.stderr, flush=True)
            part = _in_process(context, name, options, limit)
        report["parts"][name] = part
        report["seconds"] = round(time.monotonic() - began, 1)
        write_json(options.out, report)
        print(f"{name}: {part['status']} {part.get('reason', '')}", flush=True)
    print(f"{report['seconds']} s, written to {options.out}")
    return int(any(part["status"] != "done" for part in report["parts"].values()))


def _in_process(context: BaseContext, name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own and return what it measured until it ended or was stopped."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "part.json", Path(folder) / "log"
        cases = Cases(options.device, TINY if options.tiny else FULL, file, time.time() + limit - _END)
        process = context.Process(target=_run, args=(name, cases, log))
        process.start()
        process.join(limit)
        reason = f"stopped after {limit:.0f} s" if process.is_alive() else ""
        _end(process)
        if not reason and process.exitcode:
            reason = f"exit status {process.exitcode}"
        said = log.read_text(errors="replace") if log.is_file() else ""
        found = json.loads(file.read_text()) if file.is_file() else {}
    for key, what in (("error", "errors in"), ("skipped", "no time for")):
        these = [case for case, result in found.items() if key in result]
        if these and not reason:
            reason = f"{what} {', '.join(these)}"
    part = {"status": "done" if not reason else "incomplete", "seconds": round(time.monotonic() - began, 1)}
    if reason:
        print(said[-4_000:], file=sys.stderr)
        part |= {"reason": reason, "log": said[-4_000:]}
    return part | {"cases": found}


def _context(device: str) -> BaseContext:
    """Return how parts start: forked from a server that has imported everything, or, if that used the GPU, afresh."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # so that asking for GPUs does not start CUDA
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(sorted({module for module, _ in PARTS.values()}))
    if device == "cpu":
        return server
    probe = server.Process(target=_start_cuda)
    probe.start()
    probe.join()
    return server if probe.exitcode == 0 else multiprocessing.get_context("spawn")


def _start_cuda() -> None:
    """Start CUDA in this process, which is an error if a process that it was forked from has done so."""
    import torch

    torch.cuda.init()


def _run(name: str, cases: Cases, log: Path) -> None:
    """Run one part in this process, with all output in a file."""
    os.setsid()  # so that all processes that it starts can be ended with it
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    getattr(importlib.import_module(PARTS[name][0]), name)(cases)


def _end(process: Any) -> None:
    """End a part's process and all that it started, which are in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _machine(device: str) -> dict[str, Any]:
    """Describe the machine, without starting CUDA in this process."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None; "
        "print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda, 'gpu': p and p.name, "
        "'capability': p and [p.major, p.minor], 'memory_gib': p and round(p.total_memory / 2**30, 1), "
        "'n_gpus': torch.cuda.device_count()}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seen = json.loads(found.stdout) if found.returncode == 0 else {"error": found.stderr[-1_000:]}
    if device == "cuda" and not seen.get("gpu"):
        sys.exit(f"Expected a GPU with --device cuda, but torch finds none ({seen}). Use --device cpu --tiny to test.")
    return {"device": device, "python": platform.python_version(), **seen}


if __name__ == "__main__":
    from benchmarks.gpu import main as run  # imported by its module name, so that other processes find it

    sys.exit(run())
