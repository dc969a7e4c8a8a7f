"""Data to start with: real cells that need no network, and simulated ones whose structure is known."""

from __future__ import annotations

from scllm.datasets._pbmc import pbmc68k
from scllm.datasets._toy import toy

__all__ = ["pbmc68k", "toy"]
