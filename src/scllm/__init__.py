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
    # namespaces are imported on first use, so that `import scllm` is fast
    if name in _NAMESPACES:
        _warn_of_namesake()
        return import_module(f"scllm.{name}")
    if name == "__version__":
        return version("scllm-tools")
    raise AttributeError(f"module 'scllm' has no attribute {name!r}")


def _warn_of_namesake() -> None:
    """Warn if the package scllm of another project is installed, whose files are in the same folder."""
    try:
        other = distribution("scllm")
    except PackageNotFoundError:
        return
    warnings.warn(
        f"The package scllm {other.version} of another project is installed besides scllm-tools. Both are imported as "
        "scllm, and their files overwrite each other. Run `pip uninstall scllm scllm-tools`, then "
        "`pip install scllm-tools`.",
        UserWarning,
        stacklevel=3,
    )


def __dir__() -> list[str]:
    return sorted(__all__)
