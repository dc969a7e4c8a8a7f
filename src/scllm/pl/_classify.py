"""How labels turned out."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from scllm._checks import groups, obs_column
from scllm._typing import FloatArray, IntArray
from scllm.metrics import confusion
from scllm.pl._axes import one_axis, show_or_return

__all__ = ["confusion_matrix"]

_LONG = 16  # letters of a name that stand slanted below a field without running into the next


def confusion_matrix(
    adata: AnnData,
    *,
    truth: str,
    predicted: str,
    normalize: bool = True,
    order: Literal["size", "similarity"] = "size",
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw which cell types (rows) were taken for which (columns).

    Parameters
    ----------
    adata
        Cells with both labels; cells that lack one are left out.
    truth
        Column of ``obs`` with the true labels.
    predicted
        Column of ``obs`` with the predicted ones, as ``scllm.tl.classify`` writes them. Labels that are none of the
        true ones (``"unknown"``) come last.
    normalize
        Colour and number are the percentage of the row, so that rare types are read like common ones; else cells.
    order
        Rows and columns by falling size, or with types that are taken for each other side by side.
    ax
        Axes to draw on, of a figure with ``layout="constrained"`` where names are long. ``None`` = a new figure.
    show
        Whether to show the figure. ``None`` = if there is a screen.

    Returns
    -------
    The axes with ``show=False`` or without a screen, else nothing.

    Examples
    --------
    >>> import scllm
    >>> adata = scllm.datasets.pbmc68k()
    >>> ax = scllm.pl.confusion_matrix(adata, truth="cell_type", predicted="louvain", show=False)
    >>> ax.images[0].get_array().shape
    (10, 21)
    """
    if order not in ("size", "similarity"):
        raise ValueError(f"order is {order!r}, 'size' or 'similarity' expected. Pass one of those.")
    both = pd.DataFrame({"truth": _labels(adata.obs, truth), "predicted": _labels(adata.obs, predicted)})
    both = both.dropna().astype(str)
    if both.empty:
        raise ValueError(
            f"no cell has both a label in obs[{truth!r}] and one in obs[{predicted!r}], some expected. "
            "Check both columns."
        )
    rows = list(both["truth"].value_counts().index)
    others = [name for name in both["predicted"].value_counts().index if name not in rows]
    counts = confusion(both["truth"], both["predicted"], rows=rows, columns=[*rows, *others])
    if order == "similarity":
        place = _by_similarity(counts[:, : len(rows)])
        rows = [rows[at] for at in place]
        counts = counts[place][:, [*place, *range(len(rows), counts.shape[1])]]
    columns = [*rows, *others]
    # inches that long names, such as those of the Cell Ontology, would take from the fields
    extra = 0.075 * max(0, max(map(len, columns)) - _LONG)
    ax = one_axis(ax, (2.4 + 0.45 * len(columns) + extra, 1.9 + 0.42 * len(rows) + extra))
    _draw(ax, counts, normalize)
    names = [f"{name} ({n:,})" for name, n in zip(rows, counts.sum(axis=1), strict=True)]
    ax.set_yticks(range(len(rows)), names)
    slant = {"rotation": 90} if extra else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(columns)), columns, **slant)
    ax.set(xlabel=f"predicted ({predicted})", ylabel=f"true ({truth})")
    _frame(ax, len(rows), len(columns))
    return show_or_return(ax, show)


def _labels(obs: pd.DataFrame, key: str) -> pd.Series:
    """A column of labels; whole numbers may be clusters, values are an error."""
    column = obs_column(obs, key)
    if pd.api.types.is_float_dtype(column):
        raise ValueError(
            f"obs[{key!r}] holds values ({column.dtype}), labels expected. If the numbers are labels: "
            f"adata.obs[{key!r}] = adata.obs[{key!r}].astype('category')."
        )
    return groups(obs, key)


def _by_similarity(counts: IntArray) -> IntArray:
    """Order of the classes in a tree that joins those taken for each other."""
    if len(counts) < 3:
        return np.arange(len(counts))
    share = counts / counts.sum(axis=1, keepdims=True)
    distance = 1 - (share + share.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True))


def _draw(ax: Axes, counts: IntArray, normalize: bool) -> None:
    """The image and, where something is, the number on it."""
    shown: FloatArray = 100 * counts / counts.sum(axis=1, keepdims=True) if normalize else counts.astype(float)
    highest = 100 if normalize else shown.max()
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    bar = ax.figure.colorbar(image, ax=ax, label="% of true type" if normalize else "cells", pad=0.02, shrink=0.8)
    bar.outline.set_visible(False)
    size = 8 if max(counts.shape) <= 20 else 5.5
    for row, column in zip(*np.nonzero(counts), strict=True):
        value = shown[row, column]
        text = ("<1" if value < 1 else f"{value:.0f}") if normalize else f"{counts[row, column]}"
        color = "white" if value > 0.6 * highest else "#333333"
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


def _frame(ax: Axes, n_rows: int, n_columns: int) -> None:
    """White lines between the fields, nothing around them; a gap before labels that are no true class."""
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    if n_columns > n_rows:
        ax.axvline(n_rows - 0.5, color="#555555", linewidth=1)
