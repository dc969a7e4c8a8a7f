"""What the parts of ``benchmarks.gpu`` have in common: sizes, and results that are written case by case."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["FULL", "TINY", "Cases", "Scale", "write_json"]


@dataclass(frozen=True)
class Scale:
    """How large the models and batches are."""

    size: str  # of scGPT
    n_tokens: int
    full: int  # tokens of the longest cell
    longest: int  # tokens of the longest real cell
    batch_sizes: tuple[int, ...]
    rounds: int
    geneformer: str
    geneformer_length: int
    geneformer_cells: int
    performers: str
    performer_cells: int
    n_embedded: int  # cells for tl.embed
    matrix: int  # of the matrix product that is the upper limit
    family_size: str
    attention: tuple[int, int]  # cells and longest cell where attention is compared


FULL = Scale(
    "base", 36_574, 1_201, 481, (512, 32), 5, "v2-104m", 4_096, 16, "base", 4, 16_384, 8_192, "small", (24, 700)
)
TINY = Scale("tiny", 200, 33, 21, (6, 3), 2, "tiny", 40, 3, "tiny", 2, 40, 128, "tiny", (6, 30))


@dataclass
class Cases:
    """Results of one part by case, in a file that is complete after every case."""

    device: str
    scale: Scale
    file: Path
    until: float
    """End of the part's time, on the clock of ``time.time``, which all processes share."""
    found: dict[str, Any] = field(default_factory=dict)

    def measure(self, name: str, function: Callable[..., Mapping[str, Any]], *arguments: Any) -> None:
        """Measure one case; its failure, or the end of the time, is a result too."""
        if time.time() > self.until:
            self.put(name, {"skipped": "the time of this part was over"})
            return
        began = time.perf_counter()
        try:
            result = dict(function(*arguments))
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:2_000]}
        self.put(name, result | {"took_s": round(time.perf_counter() - began, 2)})
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def put(self, name: str, result: Mapping[str, Any]) -> None:
        """Add a result and write the file; numbers that are not finite are an error."""
        odd = [key for key, value in result.items() if isinstance(value, float) and not math.isfinite(value)]
        kept = {key: value for key, value in result.items() if key not in odd}
        self.found[name] = kept | ({"error": f"not finite: {', '.join(odd)}"} if odd else {})
        write_json(self.file, self.found)
        print(f"  {name}: {json.dumps(result)[:400]}", file=sys.stderr, flush=True)


def write_json(file: Path, content: object) -> None:
    """Write a file beside the old one and rename it, so that it is complete at any time; NaN is an error."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(json.dumps(content, indent=1, allow_nan=False))
    os.replace(fresh, file)
