"""Pretrain, fine-tune and use single-cell transformers on AnnData."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scllm import datasets, get, metrics, models, pl, pp, settings, tl

__all__ = ["__version__", "datasets", "get", "metrics", "models", "pl", "pp", "settings", "tl"]

_NAMESPACES = ("datasets", "get", "metrics", "models", "pl", "pp", "settings", "tl")


def __getattr__(name: str) -> Any:
    # namespaces load when they are first touched, so that `import scllm` stays fast
    if name in _NAMESPACES:
        _warn_of_namesake()
        return import_module(f"scllm.{name}")
    if name == "__version__":
        return version("scllm-tools")
    raise AttributeError(f"module 'scllm' has no attribute {name!r}")


def _warn_of_namesake() -> None:
    """Another project's distribution is called scllm, and its files go to the same folder as ours."""
    try:
        other = distribution("scllm")
    except PackageNotFoundError:
        return
    warnings.warn(
        f"the distribution scllm {other.version} of another project is installed beside scllm-tools, no other package "
        "that imports as scllm expected: their files overwrite each other. Run `pip uninstall scllm scllm-tools`, then "
        "`pip install scllm-tools`.",
        UserWarning,
        stacklevel=3,
    )


def __dir__() -> list[str]:
    return sorted(__all__)
