"""What the user may set for the whole session: ``scllm.settings.verbosity = 0`` switches progress bars off."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cache_dir", "run_dir", "verbosity"]

verbosity: int = 1
"""0: no progress bars. 1: progress bars in terminals and notebooks."""

run_dir: Path = Path("scllm_runs")
"""Where training runs without a ``run_dir`` of their own are written."""

cache_dir: Path = Path.home() / ".cache" / "scllm"
"""Where downloads that the user asked for are kept."""
