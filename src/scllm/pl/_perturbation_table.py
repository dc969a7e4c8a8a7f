"""Plot the scores of perturbation predictions, between the mean baseline and the replicate."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from scllm._checks import missing_key
from scllm._results import recorded
from scllm.metrics import PERTURBATION_METRICS
from scllm.pl._axes import one_axis, show_or_return

__all__ = ["perturbation_table"]

_TITLES = {
    "pearson": "Pearson\nall genes",
    "pearson_top20": "Pearson\ntop 20",
    "mse": "MSE",
    "weighted_mse": "weighted\nMSE",
    "discrimination": "discrimi-\nnation",
    "direction": "direction",
    "overlap": "overlap",
    "lfc_error": "error of\nlog FC",
}
_ENDS = ("model", "replicate")


def perturbation_table(
    adata: AnnData | pd.DataFrame,
    *,
    among: str | None = None,
    scaled: bool = False,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Plot the scores of ``scllm.tl.fit_perturbation`` as a table: the model, baselines, and the replicate ceiling.

    Colours are the scaled scores: white is the mean baseline (0) or worse, dark the replicate (1). Fields without a
    scaled score, because the two do not differ clearly, are grey. The best method of a column beside the replicate is
    bold.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.fit_perturbation``, or its ``summary``.
    among
        ``"all"`` held-out perturbations, or those whose genes are ``"measured"``. ``None``: the latter, if given.
    scaled
        Whether to write scaled scores instead of scores.
    ax
        Axes to draw on. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes, if the figure is not shown.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = [("all", name, "pearson", score, score, 3, 0) for name, score in (("model", 0.4), ("mean", 0.5))]
    >>> columns = ["among", "method", "metric", "score", "scaled", "n", "n_unscaled"]
    >>> scllm.pl.perturbation_table(pd.DataFrame(rows, columns=columns), show=False).get_yticklabels()[0].get_text()
    'model'
    """
    if isinstance(adata, AnnData):
        table = recorded(adata, "perturbation", made_by="scllm.tl.fit_perturbation(adata, ...)")["summary"]
    else:
        table = adata
    for column in ("among", "method", "metric", "score", "scaled"):
        if column not in table:
            raise missing_key(column, table.columns, "a column of the table", "Pass the summary of fit_perturbation.")
    kinds = list(dict.fromkeys(table["among"].astype(str)))
    among = among or kinds[-1]
    if among not in kinds:
        raise missing_key(among, kinds, "a kind of perturbations in the table")
    table = table[table["among"].astype(str) == among].astype({"method": str, "metric": str})
    score, share = (table.pivot(index="method", columns="metric", values=v) for v in ("score", "scaled"))
    first, last = ([name for name in names if name in score.index] for names in (_ENDS[:1], _ENDS[1:]))
    order = first + [name for name in dict.fromkeys(table["method"]) if name not in _ENDS] + last
    metrics = [name for name in PERTURBATION_METRICS if name in score]
    ax = one_axis(ax, (2.6 + 0.85 * len(metrics), 1.1 + 0.34 * len(order)))
    for column, metric in enumerate(metrics):
        best = share[metric].drop(index=_ENDS[1], errors="ignore").max()
        for row, method in enumerate(order):
            value, at = score.loc[method, metric], share.loc[method, metric]
            _draw_field(ax, column, row, at if scaled else value, at, is_best=at == best)
        ax.text(column + 0.5, -0.12, _TITLES[metric], ha="center", va="bottom", fontsize="small")
    ax.set(xlim=(0, max(len(metrics), 1)), ylim=(len(order), -0.9))
    ax.set_yticks([row + 0.5 for row in range(len(order))], order)
    ax.set_xticks([])
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    return show_or_return(ax, show)


def _draw_field(ax: Axes, column: int, row: int, value: float, share: float, *, is_best: bool) -> None:
    color = "#EEEEEE" if np.isnan(share) else mpl.colormaps["Blues"](0.85 * float(np.clip(share, 0, 1)))
    ax.add_patch(Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, color=color, linewidth=0))
    text = "–" if np.isnan(value) else f"{value:.2f}"
    ink = "white" if share > 0.65 else "#222222"
    weight = "bold" if is_best else "normal"
    ax.text(
        column + 0.5, row + 0.5, text, ha="center", va="center_baseline", fontsize="small", color=ink, weight=weight
    )
