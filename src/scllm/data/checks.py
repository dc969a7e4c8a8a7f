"""Checking once, before anything that takes long, that a matrix is what the model needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from anndata import AnnData

from scllm import _keys
from scllm._log import DataWarning, warn
from scllm._typing import CSR, IntArray
from scllm.data.cells import CellSource
from scllm.data.source import RAW, has_layer, layer_names, open_source
from scllm.data.value_kind import JUDGED_CELLS, as_counts, is_near_integer, value_kind

__all__ = ["check_source", "check_values", "layer_with_counts", "read_checked", "warn_of_empty_cells"]

_SAMPLED_ROWS = 2_048
_BLOCK = 256  # number of rows copied at a time
_LOOKS_LIKE = {
    "scaled": "They look like normalised or scaled counts",
    "other": "They may be denoised or ambient-corrected counts",
}


def check_source(
    source: CellSource, *, needs_counts: bool, layer: str | None, hint: Callable[[], str] | None = None
) -> None:
    """Raise ``ValueError`` on negative, non-finite or all-zero values, or on logarithms if counts are needed.

    In memory, every value is checked. On disk, only rows spread over the file are; the others are checked when they are
    read. Other values that are not integers are counted in a warning. ``hint`` returns advice for the message, and is
    called only if there is something to say.
    """
    if source.n_obs == 0 or len(source.genes) == 0:
        raise ValueError(
            f"Expected at least one cell and one gene, got {source.n_obs} cells and {len(source.genes)} genes. "
            "Check the filters that came before."
        )
    # a folder of token sequences passed this check when it was written, and no longer holds counts
    needs_counts = needs_counts and not hasattr(source, "medians")
    step = max(1, source.n_obs // _SAMPLED_ROWS) if source.chunked else 1
    rows = np.arange(0, source.n_obs, step)
    maximum, n_odd, first_odd = 0.0, 0, ""
    odd_rows: list[IntArray] = []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        counts = source.read(block)
        check_values(counts, source, block, layer=layer, hint=hint)
        maximum = max(maximum, float(counts.data.max(initial=0)))
        odd = np.flatnonzero(~is_near_integer(counts.data)) if needs_counts else np.empty(0, np.int64)
        if len(odd):
            first_odd = first_odd or _place(counts, source, block, odd[0])
            n_odd += len(odd)
            odd_rows.append(block[np.unique(np.searchsorted(counts.indptr, odd, side="right") - 1)])
    if maximum == 0:
        advice = (hint and hint()) or "Pass the layer that holds counts with `layer=`."
        raise ValueError(f"Expected counts, but {_name(layer)} holds nothing but zeros. {advice}")
    if not n_odd:
        return
    cells = np.concatenate(odd_rows)
    kind = value_kind(source.read(cells[np.linspace(0, len(cells) - 1, min(JUDGED_CELLS, len(cells))).astype(int)]))
    advice = (hint and hint()) or ""
    if kind == "logged":
        advice = advice or "Pass the layer that holds counts with `layer=`, or undo the logarithm."
        raise ValueError(
            f"Expected raw counts, but {_name(layer)} holds non-integers (first: {first_odd}) and looks log-normalised "
            f"(maximum {maximum:.4g}). {advice}"
        )
    looked_at = "" if len(rows) == source.n_obs else f" looked at, of {source.n_obs:,}"
    warn(
        f"{_name(layer)} holds {n_odd:,} values that are not integers, in {len(cells):,} of {len(rows):,} "
        f"cells{looked_at} (first: {first_odd}; maximum: {maximum:.4g}). {_LOOKS_LIKE[kind]} and are used unchanged. "
        f"{advice or 'If a layer holds raw counts, pass it with `layer=`.'}",
        DataWarning,
    )


def check_values(
    counts: CSR, source: CellSource, rows: IntArray, *, layer: str | None, hint: Callable[[], str] | None = None
) -> None:
    """Raise ``ValueError`` at the first negative or non-finite value in ``counts``, read from ``rows`` of a source."""
    data = counts.data
    if not len(data):
        return
    lowest = data.min()  # NaN if there is one
    if lowest >= 0 and np.isfinite(data.max()):
        return
    at = int(np.flatnonzero(~((data >= 0) & np.isfinite(data)))[0])
    what, why = ("negative", " Scaled or regressed data cannot be used.") if data[at] < 0 else ("non-finite", "")
    advice = (hint and hint()) or "Pass a layer that holds counts with `layer=`."
    raise ValueError(
        f"Expected non-negative finite values, but {_name(layer)} holds {what} values (first: "
        f"{_place(counts, source, rows, at)}).{why} {advice}"
    )


def read_checked(source: CellSource, rows: IntArray) -> CSR:
    """Read rows of a source, remove floating-point noise, and check values that :func:`check_source` only sampled."""
    counts = source.read(rows)
    if source.chunked:
        check_values(counts, source, rows, layer=source.layer)
    return as_counts(counts)


def layer_with_counts(data: object, layer: str | None = None, *, into_x: bool = False) -> str:
    """Write advice on where the data hold counts other than in ``layer``; empty if they do not.

    ``into_x`` is for verbs that only read X.
    """
    for name in layer_names(data):
        if name == layer or name in _written(data):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # the warning of non-integers: such a layer does not hold counts
                check_source(open_source(data, layer=name), needs_counts=True, layer=name)
        except (ValueError, TypeError, KeyError, UserWarning):  # includes layers that cannot be read
            continue
        if name is None:
            return "X holds counts: leave `layer=` out."
        where = "adata.raw" if name == RAW and not has_layer(data, RAW) else f"Layer {name!r}"
        return f"{where} holds counts: {_into_x(where, name) if into_x else f'pass layer={name!r}'}."
    return ""


def _into_x(where: str, name: str) -> str:
    matrix = f"adata.layers[{name!r}]" if where != "adata.raw" else "adata.raw[:, adata.var_names].X"
    return f"adata.X = {matrix}.copy()"


def _written(data: object) -> set[str | None]:
    """Name the layers of bins and ranks, which are integers but not counts."""
    verbs = data.uns.get(_keys.UNS, {}) if isinstance(data, AnnData) else {}
    keys = (verbs.get(verb, {}).get("params", {}).get("key_added") for verb in ("bin_expression", "rank_expression"))
    return {_keys.BINNED, _keys.RANKED, *(str(key) for key in keys if key is not None)}


def _place(counts: CSR, source: CellSource, rows: IntArray, at: int) -> str:
    """Describe one entry by value, gene and cell; this reads the names of the cells from the file."""
    cell = source.obs_names[rows[int(np.searchsorted(counts.indptr, at, side="right")) - 1]]
    return f"{counts.data[at]:.4g}, gene {source.genes[counts.indices[at]]!r} in cell {cell!r}"


def warn_of_empty_cells(n_empty: int, n_cells: int) -> None:
    """Warn of cells that express no gene of the vocabulary, whose only token is ``<cls>``."""
    if n_empty:
        warn(
            f"{n_empty} of {n_cells} cells express no gene in the model's vocabulary and will be read as empty cells, "
            "with no token but `<cls>`. Filter them first if that is not what you want."
        )


def _name(layer: str | None) -> str:
    return "X" if layer is None else f"layer {layer!r}"
