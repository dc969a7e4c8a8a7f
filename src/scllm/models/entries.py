"""Methods that are called instead of ``forward``, marked where they are defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

__all__ = ["entries", "entry"]

Method = TypeVar("Method", bound=Callable)


def entry(method: Method) -> Method:
    """Mark a method that objectives or other modules call instead of ``forward``.

    With weights sharded over ranks (``strategy="fsdp"``), the method then gathers the weights it needs. A method that
    replaces a marked one of a base class is marked, too.
    """
    method.is_entry = True  # type: ignore[attr-defined]
    return method


def entries(module: nn.Module) -> list[str]:
    """Return the names of a module's marked methods."""
    kinds = type(module).__mro__
    return sorted({name for kind in kinds for name, value in vars(kind).items() if hasattr(value, "is_entry")})
