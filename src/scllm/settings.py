"""Settings for the whole session, such as ``scllm.settings.verbosity = 0``."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path

__all__ = ["cache_dir", "run_dir", "verbosity"]

verbosity: int = 2
"""How much scllm says, with the levels of scanpy. It may be changed at any time.

0: errors only. Progress bars, log lines and the warnings of scllm are off.
1: warnings too, and progress bars in terminals and notebooks.
2: info too: what a verb is about to do (cells, matrix, matched genes, tokens a cell, device, precision, expected time).
3: hints too: details, such as the loss of each epoch and what each fold of a cross-validation does.

Log lines go to Python's logger ``scllm``. They are shown by the handlers of the application, if it has any that show
them, and otherwise as plain lines: on stdout in a notebook, as those of scanpy, else on stderr.
"""

run_dir: Path = Path("scllm_runs")
"""Where training runs without a ``run_dir`` of their own are written."""

cache_dir: Path = user_cache_path("scllm")
"""Where downloads that the user asked for are kept: the platform's cache directory."""
