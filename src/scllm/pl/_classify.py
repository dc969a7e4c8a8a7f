"""Plot predicted against true labels."""

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

_LONG = 16  # longest name, in letters, that fits slanted below a column


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
    """Plot a confusion matrix: true cell types (rows) by predicted ones (columns).

    Parameters
    ----------
    adata
        Cells with both labels. Cells that lack one are ignored.
    truth
        Column of ``obs`` with the true labels.
    predicted
        Column of ``obs`` with the predicted labels, as ``scllm.tl.classify`` writes them. Labels that are not among the
        true ones (such as ``"unknown"``) are the last columns.
    normalize
        Whether to show the percentage of each true type, which makes rare types comparable, or the number of cells.
    order
        ``"size"`` sorts types by decreasing number of cells; ``"similarity"`` places confused types next to each other.
    ax
        Axes to draw on; for long names, use a figure with ``layout="constrained"``. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes, if the figure is not shown.

    Examples
    --------
    >>> import scllm
    >>> adata = scllm.datasets.pbmc68k()
    >>> ax = scllm.pl.confusion_matrix(adata, truth="cell_type", predicted="louvain", show=False)
    >>> ax.images[0].get_array().shape
    (10, 21)
    """
    if order not in ("size", "similarity"):
        raise ValueError(f"Expected order to be 'size' or 'similarity', got {order!r}. Pass one of these.")
    both = pd.DataFrame({"truth": _labels(adata.obs, truth), "predicted": _labels(adata.obs, predicted)})
    both = both.dropna().astype(str)
    if both.empty:
        raise ValueError(
            f"Expected cells with a label in both obs[{truth!r}] and obs[{predicted!r}], but there are none. Check "
            "both columns."
        )
    rows = list(both["truth"].value_counts().index)
    others = [name for name in both["predicted"].value_counts().index if name not in rows]
    counts = confusion(both["truth"], both["predicted"], rows=rows, columns=[*rows, *others])
    if order == "similarity":
        place = _by_similarity(counts[:, : len(rows)])
        rows = [rows[at] for at in place]
        counts = counts[place][:, [*place, *range(len(rows), counts.shape[1])]]
    columns = [*rows, *others]
    # inches to add for long names, such as those of the Cell Ontology
    extra = 0.075 * max(0, max(map(len, columns)) - _LONG)
    ax = one_axis(ax, (2.4 + 0.45 * len(columns) + extra, 1.9 + 0.42 * len(rows) + extra))
    _draw(ax, counts, normalize)
    names = [f"{name} ({n:,})" for name, n in zip(rows, counts.sum(axis=1), strict=True)]
    ax.set_yticks(range(len(rows)), names)
    slant = {"rotation": 90} if extra else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(columns)), columns, **slant)
    ax.set(xlabel=f"predicted label ({predicted})", ylabel=f"true label ({truth})")
    _frame(ax, len(rows), len(columns))
    return show_or_return(ax, show)


def _labels(obs: pd.DataFrame, key: str) -> pd.Series:
    """Return a column of labels; integers may be clusters, floats are an error."""
    column = obs_column(obs, key)
    if pd.api.types.is_float_dtype(column):
        raise ValueError(
            f"Expected labels in obs[{key!r}], got values ({column.dtype}). If the numbers are labels, run "
            f"adata.obs[{key!r}] = adata.obs[{key!r}].astype('category')."
        )
    return groups(obs, key)


def _by_similarity(counts: IntArray) -> IntArray:
    """Order classes by a hierarchical clustering that joins confused ones."""
    if len(counts) < 3:
        return np.arange(len(counts))
    share = counts / counts.sum(axis=1, keepdims=True)
    distance = 1 - (share + share.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True))


def _draw(ax: Axes, counts: IntArray, normalize: bool) -> None:
    """Draw the image, and the number on every field that is not zero."""
    shown: FloatArray = 100 * counts / counts.sum(axis=1, keepdims=True) if normalize else counts.astype(float)
    highest = 100 if normalize else shown.max()
    image = ax.imshow(shown, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    bar = ax.figure.colorbar(
        image, ax=ax, label="% of true label" if normalize else "number of cells", pad=0.02, shrink=0.8
    )
    bar.outline.set_visible(False)
    size = 8 if max(counts.shape) <= 20 else 5.5
    for row, column in zip(*np.nonzero(counts), strict=True):
        value = shown[row, column]
        text = ("<1" if value < 1 else f"{value:.0f}") if normalize else f"{counts[row, column]}"
        color = "white" if value > 0.6 * highest else "#333333"
        ax.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


def _frame(ax: Axes, n_rows: int, n_columns: int) -> None:
    """Draw white lines between fields, and a line before labels that are not among the true classes."""
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(n_columns + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(n_rows + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.tick_params(which="both", length=0)
    if n_columns > n_rows:
        ax.axvline(n_rows - 0.5, color="#555555", linewidth=1)
