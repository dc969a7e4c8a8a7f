"""Pretrain, fine-tune and use single-cell transformers on AnnData."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scllm import datasets, get, models, pl, pp, settings, tl

__all__ = ["__version__", "datasets", "get", "models", "pl", "pp", "settings", "tl"]

_NAMESPACES = ("datasets", "get", "models", "pl", "pp", "settings", "tl")


def __getattr__(name: str) -> Any:
    # namespaces load when they are first touched, so that `import scllm` stays fast
    if name in _NAMESPACES:
        return import_module(f"scllm.{name}")
    if name == "__version__":
        return version("scllm-tools")
    raise AttributeError(f"module 'scllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
