"""Simulate training on up to 64 GPUs: ``python -m benchmarks.simulate [--share 0.4]``.

A step takes the longer of computing and communicating, as far as the two overlap. Floating-point operations and bytes
are counted from the models; rates of the hardware are assumptions, stated here and printed with the tables. Pass the
share of the matrix rate that ``python -m benchmarks.gpu`` measured to replace the assumed one.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch

from scllm import models
from scllm.engine.estimate import flops_per_cell

MATRIX_RATE = 790e12  # FLOP/s of plain bf16 matrix products on an H200
NODE, NVLINK, NETWORK = 8, 300e9, 40e9  # GPUs a machine, and bytes/s a GPU within and between machines
LATENCY = 30e-6  # seconds a collective, for each doubling of the number of GPUs
BUCKET = 25 * 2**20  # bytes; DDP sends the last of these when the backward pass has ended
MEMORY = 70e9  # bytes a GPU for weights, gradients and optimiser: half of an H200, the rest is for activations
LEAST = 0.8  # a group of GPUs pays if it is at least this efficient
CASES = (
    ("scgpt", "base", 480),
    ("scgpt", "base", 1_201),
    ("geneformer", "v2-104m", 2_048),
    ("geneformer", "v2-316m", 4_096),
)
COLUMNS = (
    "model", "tokens a cell", "strategy", "cells a GPU from which 8, 64 GPUs are 80 % efficient",
    "cells/s on 1, 8, 64 GPUs, 64 cells each", "an epoch of 10⁸ cells on 64 GPUs", "state a GPU on 1, 64 GPUs",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A model and the length of its cells."""

    name: str
    n_weights: int
    n_blocks: int
    flops: float  # of one cell in training
    n_tokens: int

    def ddp(self, n: int, cells: float, share: float) -> float:
        """Seconds of a step in which every GPU has some cells; gradients are averaged during the backward pass."""
        compute = cells * self.flops / (share * MATRIX_RATE)
        sent = all_reduce(4 * self.n_weights, n)
        last = all_reduce(min(BUCKET, 4 * self.n_weights), n)
        return compute / 3 + max(2 / 3 * compute, sent - last) + last

    def fsdp(self, n: int, cells: float, share: float) -> float:
        """The same with sharded weights: gathered twice in bf16, and gradients scattered in fp32, block by block."""
        compute = cells * self.flops / (share * MATRIX_RATE)
        each = self.n_weights / self.n_blocks
        gather, scatter = all_gather(2 * each, n), all_gather(4 * each, n)
        forward = max(compute / 3, self.n_blocks * gather)
        backward = max(2 / 3 * compute, self.n_blocks * (gather + scatter))
        return gather + forward + backward + scatter

    def state(self, n: int) -> float:
        """Bytes a GPU of weights, gradients and two moments in fp32, sharded over ``n`` GPUs."""
        return 16 * self.n_weights / n


def all_gather(n_bytes: float, n: int) -> float:
    """Seconds to gather (or to reduce and scatter) an array of which each of ``n`` GPUs holds a part."""
    if n == 1:
        return 0.0
    inside, machines = min(n, NODE), max(1, n // NODE)
    within = (inside - 1) / inside * n_bytes / NVLINK
    between = (machines - 1) / machines * n_bytes / (NETWORK * inside)
    return within + between + LATENCY * math.log2(n)


def all_reduce(n_bytes: float, n: int) -> float:
    """Seconds to sum an array over GPUs: reduce and scatter, then gather."""
    return 2 * all_gather(n_bytes, n)


def job(family: str, size: str, n_tokens: int) -> Job:
    with torch.device("meta"):
        model = models.build(family, vocab=[f"G{i}" for i in range(20_000)], size=size)
    blocks = list(model.blocks)
    return Job(f"{family} {size}", model.n_parameters, len(blocks), flops_per_cell(model, n_tokens), n_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.add_argument("--share", type=float, default=0.4, help="share of the matrix rate in training (default: 0.4)")
    share = parser.parse_args().share
    print(
        f"Without sharding, {MEMORY / 1e9:.0f} GB a GPU hold the state of {MEMORY / 16e9:.1f} billion weights.\n"
        f"Assumed: {share:.0%} of {MATRIX_RATE / 1e12:.0f} TFLOP/s a GPU, {NODE} GPUs a machine, {NVLINK / 1e9:.0f} "
        f"GB/s a GPU within and {NETWORK / 1e9:.0f} GB/s between machines, {LATENCY * 1e6:.0f} us a collective and "
        "doubling.\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for case in CASES:
        one = job(*case)
        for strategy in ("ddp", "fsdp"):
            step = getattr(one, strategy)
            least = [least_cells(one, step, n, share) for n in (8, 64)]
            rates = [n * 64 / step(n, 64, share) for n in (1, 8, 64)]
            state = [one.state(1 if strategy == "ddp" else n) for n in (1, 64)]
            print(
                f"| {one.name}, {one.n_weights / 1e6:.0f} M | {one.n_tokens:,} | {strategy} | "
                f"{least[0]}, {least[1]} | {', '.join(f'{rate:,.0f}' for rate in rates)} | "
                f"{1e8 / rates[-1] / 3600:.1f} h | {state[0] / 1e9:.1f}, {state[1] / 1e9:.1f} GB |"
            )


def least_cells(one: Job, step, n: int, share: float) -> int:
    """Smallest number of cells a GPU (a power of two) with which ``n`` GPUs are at least 80 % efficient."""
    return next(
        cells for cells in (2**k for k in range(20)) if one.ddp(1, cells, share) / step(n, cells, share) >= LEAST
    )


if __name__ == "__main__":
    main()
