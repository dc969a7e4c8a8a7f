"""Is this matrix what the model needs? Asked once, before anything long starts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from scllm import _keys
from scllm._log import warn
from scllm._typing import CSR, IntArray
from scllm.data.source import CellSource, open_source

__all__ = ["check_source", "check_values", "is_log_like", "layer_with_counts", "read_checked", "warn_of_empty_cells"]

_LOGGED_MAXIMUM = 50  # log1p of any real count is far below; a count matrix of a whole cell is not
_SAMPLED_ROWS = 2_048
_BLOCK = 256  # rows copied at a time


def check_source(
    source: CellSource, *, needs_counts: bool, layer: str | None, hint: Callable[[], str] | None = None
) -> None:
    """Raise ``ValueError`` on negative, non-finite, all-zero or (where counts are needed) non-integer values.

    In memory every value is looked at; on disk rows spread over the file are, and the rest when it is read. ``hint``
    is asked for advice only where values look logged.
    """
    if source.n_obs == 0 or len(source.genes) == 0:
        raise ValueError(
            f"the data have {source.n_obs} cells and {len(source.genes)} genes, at least one of each expected. "
            "Check the filters that came before."
        )
    # a folder of sentences passed this check where it was written, and holds no counts any more
    needs_counts = needs_counts and not hasattr(source, "medians")
    step = max(1, source.n_obs // _SAMPLED_ROWS) if source.chunked else 1
    rows = np.arange(0, source.n_obs, step)
    maximum, n_odd, first_odd = 0.0, 0, None
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        counts = source.read(block)
        check_values(counts, source, block, layer=layer)
        maximum = max(maximum, float(counts.data.max(initial=0)))
        if needs_counts and not np.issubdtype(counts.dtype, np.integer):
            odd = np.flatnonzero(counts.data != np.rint(counts.data))
            n_odd += len(odd)
            if len(odd) and first_odd is None:
                cell = int(np.searchsorted(counts.indptr, odd[0], side="right")) - 1
                first_odd = f"{counts.data[odd[0]]:.4g} in cell {source.obs_names[block[cell]]!r}"
    if maximum == 0:
        raise ValueError(
            f"{_name(layer)} holds nothing but zeros, counts expected. Pass the layer that holds counts with `layer=`."
        )
    if n_odd and maximum < _LOGGED_MAXIMUM:
        advice = (hint and hint()) or "Pass the raw layer with `layer=`, or undo the normalisation."
        raise ValueError(
            f"{_name(layer)} holds non-integers (first: {first_odd}) and looks log-normalised (maximum {maximum:.3g}), "
            f"raw counts expected. {advice}"
        )
    if n_odd:
        looked_at = "" if len(rows) == source.n_obs else f" in the {len(rows):,} cells looked at"
        warn(
            f"{_name(layer)} holds {n_odd:,} values that are no integers (first: {first_odd}){looked_at}, raw counts "
            "are expected. They are used as they are; pass the layer with raw counts with `layer=` if there is one."
        )


def check_values(counts: CSR, source: CellSource, rows: IntArray, *, layer: str | None) -> None:
    """Raise ``ValueError`` at the first negative or non-finite value of what was read from ``rows`` of a source."""
    data = counts.data
    if not len(data):
        return
    lowest = data.min()  # NaN if there is one
    if lowest >= 0 and np.isfinite(data.max()):
        return
    at = int(np.flatnonzero(~((data >= 0) & np.isfinite(data)))[0])
    # names of cells are read from the file each time: only where one is needed
    cell = source.obs_names[rows[int(np.searchsorted(counts.indptr, at, side="right")) - 1]]
    gene = source.genes[counts.indices[at]]
    what = "negative" if data[at] < 0 else "non-finite"
    raise ValueError(
        f"{_name(layer)} holds {what} values (first: {data[at]:g}, gene {gene!r} in cell {cell!r}), non-negative "
        "finite expression expected. Scaled or regressed data cannot be used: pass a layer with counts with `layer=`."
    )


def read_checked(source: CellSource, rows: IntArray) -> CSR:
    """Rows of a source; what :func:`check_source` saw only a sample of is looked at now."""
    counts = source.read(rows)
    if source.chunked:
        check_values(counts, source, rows, layer=source.layer)
    return counts


def is_log_like(values: NDArray[Any]) -> bool:
    """Whether values were logged or scaled already: negative, or fractions under a maximum that counts exceed."""
    has_fractions = bool(np.any(values != np.rint(values)))
    return has_fractions and bool(values.min() < 0 or values.max() < _LOGGED_MAXIMUM)


def layer_with_counts(data: object, takes_layer: bool = True) -> str:
    """Which layer of an AnnData holds counts, as advice; nothing for other data, or if none does."""
    if not isinstance(data, AnnData):
        return ""
    written = _written(data)
    for name in (name for name in data.layers if name not in written):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of non-integers: they are no counts
                check_source(open_source(data, layer=name), needs_counts=True, layer=name)
        except (ValueError, TypeError, UserWarning):  # or it cannot be read at all
            continue
        advice = f"pass layer={name!r}" if takes_layer else f"put it into X (adata.X = adata.layers[{name!r}])"
        return f"Layer {name!r} holds counts: {advice}."
    return "" if takes_layer else "Put raw counts into X."


def _written(adata: AnnData) -> set[str]:
    """Layers of bins and ranks: integers, and no counts."""
    verbs = adata.uns.get(_keys.UNS, {})
    keys = (verbs.get(verb, {}).get("params", {}).get("key_added") for verb in ("bin_expression", "rank_expression"))
    return {_keys.BINNED, _keys.RANKED, *(str(key) for key in keys if key is not None)}


def warn_of_empty_cells(n_empty: int, n_cells: int) -> None:
    """Count the cells that express no gene of the vocabulary: they get ``<cls>`` alone."""
    if n_empty:
        warn(
            f"{n_empty} of {n_cells} cells express no gene of the model's vocabulary, at least one expected. They are "
            "kept and read as `<cls>` alone; leave them out if that is not meant."
        )


def _name(layer: str | None) -> str:
    return "X" if layer is None else f"layer {layer!r}"
