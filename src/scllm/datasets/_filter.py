"""Checking a filter of cells before it is sent to a SOMA, which explains mistakes poorly or not at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from scllm._checks import missing_key
from scllm._log import log

__all__ = ["checked_filter", "closest", "compared_texts"]

_PRIMARY = "is_primary_data"


def checked_filter(obs_filter: str | None, columns: Sequence[str]) -> str | None:
    """Return the filter with duplicate cells left out, unless it says itself which it wants.

    Parameters
    ----------
    obs_filter
        Comparisons of columns with values, joined by ``and`` and ``or``; ``None``: all cells.
    columns
        Columns of ``obs`` in the SOMA. A name in the filter that is not one of them is a ``KeyError``.
    """
    if obs_filter is not None and not isinstance(obs_filter, str):
        raise TypeError(
            f"Expected obs_filter to be a string or None, got {obs_filter!r}. Pass \"cell_type == 'B cell'\"."
        )
    names = [] if obs_filter is None else list(_columns_of(_parsed(obs_filter)))
    for name in names:
        if name not in columns:
            raise missing_key(name, columns, "a column of obs", "In obs_filter, put text in quotes: column == 'text'.")
    if _PRIMARY in names:
        return obs_filter
    if _PRIMARY not in columns:
        log.info("keeping cells that may be in several data sets: obs has no column %r", _PRIMARY)
        return obs_filter
    primary = f"{_PRIMARY} == True"
    return primary if obs_filter is None else f"({obs_filter.strip()}) and {primary}"


def compared_texts(obs_filter: str) -> Iterator[tuple[str, str]]:
    """Yield each column that has to be equal to a text, or in a list of texts, with the text."""
    for node in ast.walk(_parsed(obs_filter)):
        match node:
            case ast.Compare(left=left, ops=[ast.Eq() | ast.In()], comparators=[right]):
                texts = right.elts if isinstance(right, ast.List | ast.Tuple | ast.Set) else [right]
                for column in _columns_of(left):
                    yield from ((column, one.value) for one in texts if isinstance(getattr(one, "value", None), str))


def closest(text: str, known: Sequence[str]) -> str:
    """Say which of the known values are closest to a text."""
    close = get_close_matches(text, known, n=3)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _parsed(obs_filter: str) -> ast.AST:
    try:
        return ast.parse(obs_filter.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"Expected obs_filter to be comparisons joined by 'and' or 'or', got {obs_filter!r} ({error.msg}). Write "
            "it like \"cell_type == 'B cell' and disease == 'normal'\"."
        ) from error


def _columns_of(tree: ast.AST) -> Iterator[str]:
    """Yield the columns that an expression names, as ``name`` or as ``attr('name')``."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) if id(node) not in called:
                yield name
            case ast.Call(func=ast.Name(id="attr"), args=[ast.Constant(value=str() as name)]):
                yield name
