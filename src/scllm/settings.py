"""Global settings, for example ``scllm.settings.verbosity = 0``."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path

__all__ = ["cache_dir", "max_image_pixels", "run_dir", "verbosity"]

verbosity: int = 2
"""How much scllm prints, with the same levels as scanpy. It can be changed at any time.

0: only errors. Progress bars, log lines and warnings of scllm are off.
1: also warnings, and progress bars in terminals and notebooks.
2: also info: what a function is about to do (cells, matrix, matched genes, tokens per cell, device, precision,
   expected time).
3: also hints: details, such as the loss of each epoch and the steps of each fold of a cross-validation.

Log lines go to Python's logger ``scllm``. They are shown by the handlers of the application, if any of them does so,
and otherwise as plain lines: on stdout in a notebook, as scanpy does, and on stderr elsewhere.
"""

run_dir: Path = Path("scllm_runs")
"""Directory for training runs that are given no ``run_dir``."""

cache_dir: Path = user_cache_path("scllm")
"""Directory for downloaded files, by default in the platform's cache directory."""

max_image_pixels: int = 500_000_000
"""Largest JPEG or PNG image that is read. These are decoded as a whole and take three bytes a pixel."""
