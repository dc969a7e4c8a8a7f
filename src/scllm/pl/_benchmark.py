"""Plot benchmark scores of several embeddings."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from scllm._checks import missing_key
from scllm._results import recorded
from scllm.metrics import BATCH_METRICS, BIO_METRICS, TRANSFER_METRICS
from scllm.pl._axes import GREY, one_axis, show_or_return

__all__ = ["benchmark_table"]

_TITLES = {
    "nmi": "NMI",
    "ari": "ARI",
    "silhouette_label": "silhouette\nlabel",
    "knn_accuracy": "kNN\naccuracy",
    "logreg_accuracy": "log. reg.\naccuracy",
    "logreg_macro_f1": "log. reg.\nmacro F1",
    "silhouette_batch": "silhouette\nbatch",
    "graph_connectivity": "graph\nconnectivity",
    "batch_mixing": "batch\nmixing",
    "transfer_from_reference": "from\nreference",
    "transfer_to_reference": "to\nreference",
    "bio": "bio",
    "batch": "batch",
    "overall": "overall",
}
_HEADINGS = {
    "bio conservation": BIO_METRICS,
    "batch correction": BATCH_METRICS,
    "label transfer": TRANSFER_METRICS,
    "means": ("bio", "overall"),
}
_GAP = 0.25  # between groups of columns


def benchmark_table(adata: AnnData | pd.DataFrame, *, ax: Axes | None = None, show: bool | None = None) -> Axes | None:
    """Plot the scores of ``scllm.tl.benchmark`` as a table, with the best embedding first.

    Colours range from 0 to 1 in every column, so equal colours are equal scores. The best score of a column is bold.
    Means are drawn as bars.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.benchmark``, or the table that it returned.
    ax
        Axes to draw on. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes, if the figure is not shown.

    Examples
    --------
    >>> import pandas as pd, scllm
    >>> table = pd.DataFrame({"nmi": [0.8, 0.7], "overall": [0.8, 0.7]}, index=["X_scllm", "X_pca"])
    >>> [tick.get_text() for tick in scllm.pl.benchmark_table(table, show=False).get_yticklabels()]
    ['X_scllm', 'X_pca']
    """
    if isinstance(adata, AnnData):
        table = recorded(adata, "benchmark", made_by="scllm.tl.benchmark(adata, key=...)")["table"]
    else:
        table = adata
    if "overall" not in table:
        raise missing_key("overall", table.columns, "a column of the table", "Pass the table of scllm.tl.benchmark.")
    table = table.sort_values("overall", ascending=False)
    places = _places(table)
    width = max(places.values()) + 1
    ax = one_axis(ax, (1.4 + 0.82 * width, 1.2 + 0.42 * len(table)))
    for name, left in places.items():
        draw = _draw_bars if name in ("bio", "batch", "overall") else _draw_fields
        draw(ax, table[name], left)
        ax.text(left + 0.5, -0.12, _TITLES[name], ha="center", va="bottom", fontsize="small")
    for title, names in _HEADINGS.items():
        _draw_heading(ax, title, [places[name] for name in names if name in places])
    ax.set(xlim=(0, width), ylim=(len(table), -1.35))
    ax.set_yticks([row + 0.5 for row in range(len(table))], table.index.astype(str))
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    return show_or_return(ax, show)


def _places(table: pd.DataFrame) -> dict[str, float]:
    """Return the left edge of each column: scores by kind, then means; without batches there is one mean."""
    means = ("bio", "batch", "overall") if "batch" in table else ("overall",)
    places, left = {}, 0.0
    for kind in (BIO_METRICS, BATCH_METRICS, TRANSFER_METRICS, means):
        present = [name for name in kind if name in table]
        places |= {name: left + at for at, name in enumerate(present)}
        left += len(present) + _GAP * bool(present)
    return places


def _draw_fields(ax: Axes, scores: pd.Series, left: float) -> None:
    """Draw one coloured field for each score."""
    for row, score in enumerate(scores):
        color = mpl.colormaps["Blues"](0.85 * score) if score == score else "#F0F0F0"
        ax.add_patch(Rectangle((left + 0.03, row + 0.05), 0.94, 0.9, color=color, linewidth=0))
        _write(ax, left + 0.5, row, score, scores, "white" if score > 0.65 else "#222222", "center")


def _draw_bars(ax: Axes, scores: pd.Series, left: float) -> None:
    """Draw one bar for each mean, as long as the score."""
    for row, score in enumerate(scores):
        ax.add_patch(Rectangle((left + 0.05, row + 0.16), 0.9, 0.68, color="#F0F0F0", linewidth=0))
        ax.add_patch(Rectangle((left + 0.05, row + 0.16), 0.9 * max(0.0, score), 0.68, color="#F2B98F", linewidth=0))
        _write(ax, left + 0.1, row, score, scores, "#222222", "left")


def _write(ax: Axes, x: float, row: int, score: float, scores: pd.Series, color: str, align: str) -> None:
    best = score == scores.max() > scores.min()
    text = "–" if score != score else f"{score:.2f}"
    weight = "bold" if best else "normal"
    ax.text(x, row + 0.5, text, ha=align, va="center_baseline", fontsize="small", color=color, fontweight=weight)


def _draw_heading(ax: Axes, title: str, lefts: list[float]) -> None:
    """Draw a title and a thin line above a group of columns."""
    if not lefts:
        return
    ax.plot([min(lefts) + 0.05, max(lefts) + 0.95], [-0.88, -0.88], color="#BBBBBB", linewidth=0.8)
    ax.text((min(lefts) + max(lefts) + 1) / 2, -0.95, title, ha="center", va="bottom", fontsize="small", color=GREY)
