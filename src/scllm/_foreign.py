"""Classes of other packages in saved settings: they are imported only if the caller trusts their package."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["foreign_class", "foreign_name"]


def foreign_name(kind: type) -> str:
    """Return the full name of a class, which has a dot."""
    return f"{kind.__module__}.{kind.__qualname__}"


def foreign_class(name: str, family: str | None) -> type[Any]:
    """Import a class by its full name, if it is of the package of a model family that the caller has passed.

    No file decides what is imported: a class of any other package is an error.
    """
    package = (family or "").partition(".")[0] if "." in (family or "") else None
    module, _, last = name.rpartition(".")
    if package is None or name.partition(".")[0] != package:
        seen = "no family of another package" if package is None else f"the family {family!r}"
        raise ValueError(
            f"Expected a class of scllm or of the package of the model's family, got {name!r} with {seen}. Define it "
            "in the package of the family, and pass that family."
        )
    found = getattr(import_module(module), last, None)
    if not isinstance(found, type):
        raise ValueError(
            f"Expected a class {last!r} in the module {module!r}, but it has none. Install the version of {package!r} "
            "that the model was saved with."
        )
    return found
