"""Plot cross-validation scores, calibration and ROC curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from scllm import metrics as scores
from scllm._checks import missing_key
from scllm._results import recorded
from scllm._typing import FloatArray
from scllm.pl._axes import COLORS, GREY, AxesArray, axis_grid, one_axis, show_or_return, tidy
from scllm.pl._probabilities import Predictions, predictions

__all__ = ["calibration", "cv_scores", "roc"]

_METHODS = {"model": ("fine-tuned", COLORS[0]), "baseline": ("baseline", GREY)}
_TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "balanced_accuracy": "balanced\naccuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "ece": "calibration\nerror ↓",
    "r2": "R²",
    "pearson": "Pearson",
    "mae": "mean absolute\nerror ↓",
}
_APART = 0.17  # distance of the two methods from the middle of a metric
_MAE = "mae"
_FEW = 5  # the accuracy in bins with fewer cells is mostly chance


def cv_scores(
    adata: AnnData | pd.DataFrame,
    *,
    metrics: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    show: bool | None = None,
) -> Axes | AxesArray | None:
    """Plot the scores of all folds for the model and the baseline.

    Points are folds, lines connect the two methods on one fold, and bars are means. If the baseline is higher on most
    lines, a linear model is better. Without the calibration error (``metrics=["accuracy", "macro_f1"]``), the axis
    begins just below the lowest fold.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.cross_validate``, or the table that it returned.
    metrics
        Metrics to plot, in this order. ``None``: all that were computed.
    ax
        Axes to draw on. Heads that predict values need two: for scores and for the error. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes (an array if there are several), if the figure is not shown.

    Examples
    --------
    >>> import pandas as pd, scllm
    >>> folds = pd.MultiIndex.from_product([["model", "baseline"], [0], [0, 1]], names=["method", "repeat", "fold"])
    >>> table = pd.DataFrame({"accuracy": [0.9, 0.92, 0.88, 0.9], "macro_f1": [0.8, 0.85, 0.8, 0.8]}, index=folds)
    >>> [tick.get_text() for tick in scllm.pl.cv_scores(table, show=False).get_xticklabels()]
    ['accuracy', 'macro F1']
    """
    table = _wide(adata)
    names = list(table.columns) if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in table:
            raise missing_key(name, table.columns, "a metric of the table")
    # the error has the unit of the values, so it gets its own axis
    panels = [part for part in ([n for n in names if n != _MAE], [n for n in names if n == _MAE]) if part]
    width = [0.5 + 1.4 * len(part) for part in panels]
    axes = axis_grid(ax, len(panels), (1.2 + sum(width), 3.4), width_ratios=width)
    for panel, part in zip(axes, panels, strict=True):
        _draw_folds(panel, table, part)
    methods = _methods(table)
    handles = [axes[0].scatter([], [], s=26, color=_METHODS[name][1], label=_METHODS[name][0]) for name in methods]
    n_folds = len(table.loc[methods[0]])
    axes[0].legend(
        handles=handles,
        title=f"{n_folds} folds",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
        alignment="left",
        borderpad=0,
    )
    return show_or_return(axes[0] if len(axes) == 1 else axes, show)


def calibration(
    adata: AnnData,
    *,
    truth: str,
    predicted: str | Sequence[str] | None = None,
    n_bins: int = 15,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Plot accuracy against the predicted probability of the label.

    On the diagonal, probabilities are calibrated; below it, the model is overconfident. The area of a point is
    proportional to the number of cells in its bin, and the line skips bins with fewer than 5 cells. The number in the
    legend is the expected calibration error, see ``scllm.metrics.expected_calibration_error``.

    Parameters
    ----------
    adata
        Cells with probabilities. Cells without a true label are ignored.
    truth
        Column of ``obs`` with the true labels.
    predicted
        Columns of ``obs`` with predicted labels that have probabilities in ``obsm``, as ``scllm.tl.classify`` writes
        them. ``None``: model and baseline of ``scllm.tl.cross_validate``.
    n_bins
        Number of bins of equal width between 0 and 1.
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
    >>> adata = scllm.datasets.toy()
    >>> truth = pd.get_dummies(adata.obs["cell_type"]).to_numpy(float)
    >>> adata.obs["label"] = adata.obs["cell_type"]
    >>> adata.obsm["label_probabilities"] = 0.8 * truth + 0.1
    >>> scllm.pl.calibration(adata, truth="cell_type", predicted="label", show=False).get_ylabel()
    'accuracy'
    """
    sources = predictions(adata, truth, predicted)
    ax = one_axis(ax, (4.2, 4.2))
    ax.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    for source in sources:
        scored = source.truth, source.probabilities, source.classes
        bins = scores.reliability(*scored, n_bins=n_bins)
        error = scores.expected_calibration_error(*scored, n_bins=n_bins)
        area = 12 + 130 * bins["n_cells"] / bins["n_cells"].max()
        many = bins[bins["n_cells"] >= _FEW]
        ax.plot(many["confidence"], many["accuracy"], color=source.color, linewidth=1.2, zorder=2)
        ax.scatter(
            bins["confidence"],
            bins["accuracy"],
            s=area,
            color=source.color,
            edgecolors="white",
            linewidths=0.6,
            alpha=0.85,
            clip_on=False,
            zorder=3,
            label=f"{source.name}  (ECE {error:.3f})",
        )
    legend = ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    for handle in legend.legend_handles:
        handle.set_sizes([28])
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="mean predicted probability", ylabel="accuracy")
    ax.set_aspect("equal")
    tidy(ax)
    return show_or_return(ax, show)


def roc(
    adata: AnnData,
    *,
    truth: str,
    predicted: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Plot ROC curves, averaged over classes.

    Each class is compared with all others, and curves are averaged over classes at each false positive rate. Thin lines
    are folds, if there are any, and the thick line is their mean. The number in the legend is the mean area under the
    curves of the folds.

    Parameters
    ----------
    adata
        Cells with probabilities. Cells without a true label are ignored.
    truth
        Column of ``obs`` with the true labels.
    predicted
        Columns of ``obs`` with predicted labels that have probabilities in ``obsm``, as ``scllm.tl.classify`` writes
        them. ``None``: model and baseline of ``scllm.tl.cross_validate``.
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
    >>> adata = scllm.datasets.toy()
    >>> truth = pd.get_dummies(adata.obs["cell_type"]).to_numpy(float)
    >>> adata.obs["label"] = adata.obs["cell_type"]
    >>> adata.obsm["label_probabilities"] = 0.8 * truth + 0.1
    >>> scllm.pl.roc(adata, truth="cell_type", predicted="label", show=False).get_ylabel()
    'true positive rate'
    """
    sources = predictions(adata, truth, predicted)
    ax = one_axis(ax, (4.2, 4.2))
    ax.plot([0, 1], [0, 1], color="#BBBBBB", linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    for source in sources:
        curves, areas = _curves(source)
        false = curves[0][0]
        if len(curves) > 1:
            for _, true in curves:
                ax.plot(false, true, color=source.color, linewidth=0.7, alpha=0.35, zorder=2)
        mean = np.mean([true for _, true in curves], axis=0)
        spread = f" ± {np.std(areas, ddof=1):.3f}" if len(areas) > 1 else ""
        ax.plot(
            false,
            mean,
            color=source.color,
            linewidth=2,
            zorder=3,
            label=f"{source.name}  (AUROC {np.mean(areas):.3f}{spread})",
        )
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    ax.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="false positive rate", ylabel="true positive rate")
    ax.set_aspect("equal")
    tidy(ax)
    return show_or_return(ax, show)


def _wide(adata: AnnData | pd.DataFrame) -> pd.DataFrame:
    """Return a table of folds by metrics, indexed by method, repeat and fold."""
    if not isinstance(adata, AnnData):
        if list(adata.index.names) != ["method", "repeat", "fold"]:
            raise ValueError(
                f"Expected a table indexed by method, repeat and fold, got {list(adata.index.names)}. Pass the table "
                "of scllm.tl.cross_validate."
            )
        return adata.sort_index()
    table = recorded(adata, "cross_validate", made_by="scllm.tl.cross_validate(adata, key=...)")["table"]
    table = table[table["class"].isna()].astype({"method": str, "metric": str})
    wide = table.pivot(index=["method", "repeat", "fold"], columns="metric", values="value")
    return wide[table["metric"].unique()]


def _methods(table: pd.DataFrame) -> list[str]:
    return [name for name in _METHODS if name in table.index.unique("method")]


def _draw_folds(ax: Axes, table: pd.DataFrame, names: Sequence[str]) -> None:
    """Draw points of the folds, lines between the methods, and means with their value."""
    methods = _methods(table)
    places = dict(zip(methods, np.linspace(-_APART, _APART, len(methods)) if len(methods) > 1 else [0.0], strict=True))
    for at, name in enumerate(names):
        folds = {method: table.loc[method, name].to_numpy() for method in methods}
        means = [np.nanmean(values) if np.isfinite(values).any() else np.nan for values in folds.values()]
        digits = 3 if np.ptp(means) < 0.01 else 2
        if len(methods) > 1:
            ax.plot([at - _APART, at + _APART], list(folds.values()), color="#C8C8C8", linewidth=0.8, zorder=1)
        for (method, values), mean in zip(folds.items(), means, strict=True):
            x, color = at + places[method], _METHODS[method][1]
            ax.scatter(np.full(len(values), x), values, s=18, color=color, alpha=0.75, linewidths=0, zorder=2)
            ax.plot([x - 0.11, x + 0.11], [mean, mean], color=color, linewidth=2.2, solid_capstyle="butt", zorder=3)
            side = -1 if places[method] < 0 else 1
            ax.annotate(
                f"{mean:.{digits}f}",
                (x + side * 0.12, mean),
                xytext=(side * 2, 0),
                textcoords="offset points",
                color=color,
                ha="right" if side < 0 else "left",
                va="center",
                fontsize="x-small",
            )
    ax.set_xticks(range(len(names)), [_TITLES.get(name, name) for name in names], fontsize="small")
    ax.set_xlim(-0.75, len(names) - 0.25)
    errors = [name for name in (_MAE, "ece") if name in names]
    # axes with errors begin at zero; on such an axis, high scores alone would lie on top of each other
    lowest = np.nanmin(table[list(names)].to_numpy(), initial=0.0 if errors else 1.0)
    bottom = 0 if errors and lowest >= 0 else 1 - 1.1 * max(1 - lowest, 0.02)
    ax.set_ylim(bottom, None if _MAE in names else 1 + min(0.02, 0.04 * (1 - bottom)))
    tidy(ax, grid="y")
    ax.tick_params(axis="x", length=0)


def _curves(source: Predictions) -> tuple[list[tuple[FloatArray, FloatArray]], list[float]]:
    """Compute the mean curve over classes and its area, for each fold or for all cells."""
    parts = [np.arange(len(source.truth))]
    if source.fold is not None:
        parts = [np.flatnonzero(source.fold == fold) for fold in np.unique(source.fold)]
    curves, areas = [], []
    for cells in parts:
        curve = scores.mean_roc(source.truth[cells], source.probabilities[cells], source.classes)
        if np.isfinite(curve[1]).all():
            curves.append(curve)
            areas.append(_area(source, cells))
    if not curves:
        raise ValueError("Expected cells of at least two classes for a ROC curve, got one class. Pass more cells.")
    return curves, areas


def _area(source: Predictions, cells: np.ndarray) -> float:
    best = source.classes[source.probabilities[cells].argmax(axis=1)]
    scored = source.truth[cells], best, source.probabilities[cells], source.classes
    return scores.classification_scores(*scored)["auroc"]
