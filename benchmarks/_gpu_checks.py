"""Parts of ``benchmarks.gpu`` that check results: attention, precision, several ranks and resuming."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks._gpu_cases import Cases
from benchmarks._gpu_rows import lengths_of, read_batch
from benchmarks.row07_gpu import seconds
from scllm import datasets, models, tl
from scllm.data.run_files import read_history
from scllm.engine.device import autocast
from scllm.engine.objectives import objective_from_dict
from scllm.engine.optim import train_mode
from scllm.models.attention import attend, attend_in_rectangles, has_varlen
from scllm.models.base import Batch

__all__ = ["attention", "precision", "resume", "two_ranks"]

_WIDTHS = (32, 64, 128, 20)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def attention(cases: Cases) -> None:
    """Compare attention with the softmax written out in fp64, by width of the heads and precision; then time it."""
    n_cells, longest = cases.scale.attention
    lengths = np.random.default_rng(0).integers(1, longest, n_cells)
    lengths[n_cells // 2] = 0  # a cell without tokens
    for width in _WIDTHS:
        for name, dtype in _DTYPES.items():
            for first_only in (False, True):
                case = f"width {width}, {name}, {'first token' if first_only else 'all tokens'}"
                cases.measure(case, _compare, cases.device, tuple(map(int, lengths)), width, dtype, first_only)
    for name, of_cells in lengths_of(cases.scale).items():
        for dtype in ("bf16", "fp32"):
            cases.measure(f"time, {name}, {dtype}", _time_attention, cases, of_cells, _DTYPES[dtype])


def _qkv(device: str, lengths: tuple[int, ...], width: int, dtype: torch.dtype, first_only: bool) -> tuple[Any, Batch]:
    torch.manual_seed(0)
    n, h = sum(lengths), 4
    sizes = (len(lengths) if first_only else n, n, n)
    tensors = [torch.randn(size, h, width, device=device).to(dtype).requires_grad_() for size in sizes]
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    return tensors, Batch(torch.zeros(n, dtype=torch.int64, device=device), None, ends, lengths, torch.zeros(0))


def _compare(device: str, lengths: tuple[int, ...], width: int, dtype: torch.dtype, first_only: bool) -> dict[str, Any]:
    inputs, batch = _qkv(device, lengths, width, dtype, first_only)
    weight = torch.randn(inputs[0].shape, device=device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = _with_gradients(_softmax(*exact, lengths, first_only), exact, weight)
    found = _with_gradients(attend(*inputs, batch, first_only=first_only), inputs, weight)
    fused = _with_gradients(_sdpa(*inputs, lengths, first_only), inputs, weight)
    errors = {
        who: {name: _difference(one, other) for name, one, other in zip(("out", "q", "k", "v"), got, expected)}
        for who, got in (("ours", found), ("sdpa", fused))
    }
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return {"varlen": has_varlen(capability, dtype, width), **errors}


def _with_gradients(out: Tensor, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), inputs)]


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


def _each_cell(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], first_only: bool, one: Any
) -> Tensor:
    queries = query.split([1] * len(lengths) if first_only else lengths)
    cells = zip(queries, key.split(lengths), value.split(lengths), strict=True)
    heads = [[x.transpose(0, 1) for x in cell] for cell in cells]  # (h, l, e)
    return torch.cat([(one(*cell) if cell[1].shape[1] else cell[0] * 0).transpose(0, 1) for cell in heads])


def _softmax(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], first_only: bool) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    return _each_cell(query, key, value, lengths, first_only, one)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], first_only: bool) -> Tensor:
    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]

    return _each_cell(query, key, value, lengths, first_only, one)


def _time_attention(cases: Cases, of_cells: np.ndarray, dtype: torch.dtype) -> dict[str, float]:
    n_cells = min(128, cases.scale.batch_sizes[0])
    lengths = tuple(map(int, np.random.default_rng(0).choice(of_cells, n_cells)))
    inputs, batch = _qkv(cases.device, lengths, 64, dtype, False)
    calls = {
        "attend_ms": lambda: attend(*inputs, batch),
        "rectangles_ms": lambda: attend_in_rectangles(*inputs, batch, False),
        "cell_by_cell_ms": lambda: _sdpa(*inputs, lengths, False),
    }
    found = {}
    for name, call in calls.items():
        both = partial(_forward_and_backward, call, inputs)
        both()
        found[name] = 1e3 * float(np.median([seconds(both) for _ in range(cases.scale.rounds)]))
    return found


def _forward_and_backward(call: Any, inputs: list[Tensor]) -> None:
    torch.autograd.grad(call().sum(), inputs)


def precision(cases: Cases) -> None:
    """Compare a training step of every family in bf16 and fp16 with fp32."""
    cells = datasets.toy(n_cells=32, n_genes=120)
    for family in sorted({*models.families()} - {"spatial"}):  # which reads no token sequences
        cases.measure(family, _step_by_precision, cases, family, cells)


def _step_by_precision(cases: Cases, family: str, cells: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(cases.device)
    model = models.build(family, vocab=cells.var_names, size=cases.scale.family_size, dropout=0.0)
    objective = objective_from_dict(model.config.objective())
    batch = read_batch(model, cells, objective, 16).to(device)
    model.to(device)
    train_mode(model)
    found = {name: _loss_and_norm(model, objective, batch, name) for name in _DTYPES}
    (loss, norm), said = found["fp32"], {"loss": found["fp32"][0], "grad_norm": found["fp32"][1]}
    for name in ("bf16", "fp16"):
        said[f"{name}_loss"] = abs(found[name][0] - loss) / abs(loss)
        said[f"{name}_grad_norm"] = abs(found[name][1] - norm) / norm
    return said


def _loss_and_norm(model: Any, objective: Any, batch: Batch, precision: str) -> tuple[float, float]:
    scale = 2.0**16 if precision == "fp16" else 1.0
    while True:
        model.zero_grad(set_to_none=True)
        with autocast(precision, model.device):
            loss = objective(model, batch, 0)
        mean = loss.sum / loss.count
        (mean * scale).backward()
        norms = [weight.grad.double().norm() for weight in model.parameters() if weight.grad is not None]
        norm = (torch.stack(norms).norm() / scale).item()
        if np.isfinite(norm) or scale == 1:
            return mean.item(), norm
        scale /= 4  # as loss scaling in training does


def resume(cases: Cases) -> None:
    """Kill a run and resume it: its losses beside those of two runs that were not interrupted."""
    cases.measure("killed and resumed", _resumed, cases.device)


def _resumed(device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = killed(folder / "broken", device)
        for run in ("broken", "whole", "again"):
            pretrain(str(folder / run), device)
        whole, again, broken = (_losses(folder / run) for run in ("whole", "again", "broken"))
    assert len(whole) == len(again) == len(broken), "the runs have different numbers of steps"
    return {
        "n_losses": len(whole),
        "killed_after_step": step,
        "equal": bool((broken == whole).all()),
        "difference": float(np.abs(broken / whole - 1).max()),
        # of two whole runs, which a GPU does not repeat to the bit
        "difference_of_whole_runs": float(np.abs(again / whole - 1).max()),
    }


def pretrain(run_dir: str, device: str) -> None:
    """Pretrain a tiny model with dropout, or resume doing so."""
    config = tl.TrainConfig(save_every=5)
    cells = datasets.toy(n_cells=480, n_genes=60)
    tl.pretrain(cells, size="tiny", device=device, epochs=2, batch_size=16, run_dir=run_dir, config=config)


def killed(run_dir: Path, device: str) -> int:
    """Start the same in another process and kill it after some steps; return the last step in the history.

    Without a GPU, the other process is forked, so that it need not import everything again.
    """
    method = "spawn" if device == "cuda" else "fork"
    process = multiprocessing.get_context(method).Process(target=pretrain, args=(str(run_dir), device))
    process.start()
    history, end = run_dir / "history.jsonl", time.monotonic() + 60
    try:
        while not history.exists() or len(history.read_text().splitlines()) < 12:
            assert process.is_alive(), "the run ended before it could be killed"
            assert time.monotonic() < end, "the run made no steps within a minute"
            time.sleep(0.005)
    finally:
        process.kill()
        process.join()
    assert not (run_dir / "done").exists(), "the run was done before it could be killed"
    return len(history.read_text().splitlines())


def _losses(run_dir: Path) -> np.ndarray:
    return read_history(run_dir / "history.jsonl")["loss"].to_numpy()


def two_ranks(cases: Cases) -> None:
    """What two processes on one GPU are told: by the verb, and by ``torchrun``; on a CPU they train together."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        cases.measure("an unfinished run", lambda: {"step": killed(run_dir, cases.device)})
        devices = ("cuda", "cuda:0") if cases.device == "cuda" else ("cpu",)
        for device in devices:
            cases.measure(f"torchrun, 2 processes, --device {device}", _torchrun, run_dir, device)
    cases.measure("n_gpus=2", _two_gpus)


def _two_gpus() -> dict[str, Any]:
    n = max(2, torch.cuda.device_count() + 1)
    try:
        tl.pretrain(datasets.toy(n_cells=20, n_genes=20), size="tiny", n_gpus=n)
    except ValueError as error:
        return {"refused": True, "message": str(error)}
    return {"refused": False, "message": ""}


def _torchrun(run_dir: Path, device: str) -> dict[str, Any]:
    """Start two processes with ``torchrun``; on a GPU machine they see one device."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scllm"]
    done = subprocess.run(
        [*command, "run", str(run_dir), "--device", device],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    said = re.findall(r"(?:Error|Expected|NCCL|Duplicate).*", done.stdout)
    return {"refused": done.returncode != 0, "exit_status": done.returncode, "message": "\n".join(said)[:2_000]}
