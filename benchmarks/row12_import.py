"""Row 12: import scllm, compared with import scanpy, in new interpreters."""

from __future__ import annotations

from statistics import median

from benchmarks._child import run_python
from benchmarks._timing import Ratio, Row

ROUNDS, TARGET_RATIO, TARGET_SECONDS = 7, 0.4, 0.8
ABSENT = ("torch", "transformers", "scanpy", "numba", "anndata")


def run() -> Row:
    run_python(f"import scllm, sys; assert not set({ABSENT}) & set(sys.modules)")
    run_python("import scanpy")
    both = [(run_python("import scllm"), run_python("import scanpy")) for _ in range(ROUNDS)]
    cpu = Ratio(*zip(*((theirs[1], ours[1]) for ours, theirs in both), strict=True))  # ours over theirs
    wall = median(ours[0] for ours, _ in both)
    start = median(run_python("pass")[1] for _ in range(ROUNDS))
    return Row(
        number=12,
        what="import scllm in a new interpreter",
        beside="import scanpy",
        ratio=f"{cpu} of the time",
        absolute=f"{wall:.2f} s compared with {median(theirs[0] for _, theirs in both):.2f} s of wall time",
        share_of_roof=f"{start / median(cpu.theirs):.0%} of it is the start of the interpreter",
        target=f"<= {TARGET_RATIO}x, <= {TARGET_SECONDS} s",
        is_met=cpu.median <= TARGET_RATIO and wall <= TARGET_SECONDS,
    )
