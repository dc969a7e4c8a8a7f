"""Plot training and validation losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from scllm import _keys
from scllm._checks import missing_key
from scllm.data.run_files import read_history
from scllm.pl._axes import GREY, AxesArray, axis_grid, colors, show_or_return, tidy

__all__ = ["loss_curves"]


class HasHistory(Protocol):
    """A trained model."""

    history: pd.DataFrame | None


Source: TypeAlias = str | PathLike[str] | AnnData | pd.DataFrame | HasHistory

_NO_LOSSES = (
    *("step", "epoch", "split", "lr", "mask_ratio", "commonest_answer", "mean_prediction"),
    "plausibility_factor",
    *("grad_norm", "cells_per_s", "tokens_per_s", "mfu", "data_wait", "peak_memory"),
)
_TRAINED_BY = ("pretrain", "finetune", "fit_spatial")
_MAX_EPOCH_MARKS = 12
_POINTS_PER_WINDOW = 25
_VALIDATION_DASHES = (0, (4, 1.5))


def loss_curves(
    source: Source | Sequence[Source],
    *,
    metrics: str | Sequence[str] | None = None,
    perplexity: bool = False,
    smooth: int | None = None,
    labels: Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    show: bool | None = None,
) -> Axes | AxesArray | None:
    """Plot training and validation loss over training steps, with one panel per loss term.

    Thin lines are logged values, thick lines their running mean, and points the validation loss. Vertical lines mark
    epochs. The ring marks the step with the lowest validation loss, whose weights are kept. If the validation loss
    rises while the training loss falls, the model overfits. The dashed grey line is the loss of predicting each gene by
    its mean, or by its frequency in gene language models: only a model below it has learnt from the other genes of a
    cell. It is drawn if the history has it, which is the case after pretraining.

    Parameters
    ----------
    source
        A run directory, a trained model, an ``AnnData`` after ``scllm.tl.pretrain`` or ``scllm.tl.finetune`` (of the
        two, pretraining is plotted), a history as a ``DataFrame``, or a list of these, which are drawn together.
    metrics
        Columns of the history to plot. ``None``: the loss and, if it has several, its terms.
    perplexity
        Plot ``exp(loss)``, by default of the total loss only. This is for gene language models, whose loss is in nats
        per gene: the perplexity is the number of equally likely genes that would give the same loss.
    smooth
        Number of logged points in the running mean; 1 is no smoothing. ``None``: a 25th of the curve.
    labels
        Names of the sources in the legend. ``None``: the names of the directories, or numbers; for one source,
        ``train``.
    ax
        Axes to draw on, one per panel. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes (an array if there are several panels), if the figure is not shown.

    Examples
    --------
    >>> import pandas as pd, scllm
    >>> history = pd.DataFrame({"step": [1, 2, 3], "epoch": 0, "split": "train", "loss": [3.0, 2.0, 1.5]})
    >>> scllm.pl.loss_curves(history, show=False).get_ylabel()
    'loss'
    """
    curves = _read_all(source, labels)
    if metrics is None:
        terms = ["loss"] if perplexity else _loss_terms(curves)
    else:
        terms = [metrics] if isinstance(metrics, str) else list(metrics)
    n_columns = min(3, len(terms))
    figsize = (0.8 + 4.4 * n_columns, 3.4 * -(-len(terms) // n_columns))
    axes = axis_grid(ax, len(terms), figsize, n_columns=n_columns)
    hues = colors(max(2, len(curves)))
    for panel, term in zip(axes, terms, strict=True):
        for curve, hue in zip(curves, hues):
            _draw(panel, curve, term, (hue, hues[1] if len(curves) == 1 else hue), smooth, perplexity)
        _draw_mean_prediction(panel, curves, term, perplexity)
        _mark_epochs(panel, [curve.history for curve in curves])
        panel.set(xlabel="training step", ylabel=f"perplexity ({term})" if perplexity else term)
        panel.margins(x=0.02)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        tidy(panel, grid="y")
    if len(curves) > 1:
        axes[0].plot([], [], color=GREY, linestyle=_VALIDATION_DASHES, marker="o", markersize=3.5, label="validation")
    axes[0].legend(frameon=False, fontsize="small")
    return show_or_return(axes[0] if len(axes) == 1 else axes, show)


@dataclass(frozen=True)
class _Curve:
    label: str
    history: pd.DataFrame

    def points(self, term: str, split: str) -> tuple[NDArray, NDArray]:
        """Return steps and values that were logged for a term, in order."""
        if term not in self.history:
            raise missing_key(term, self.history.columns, "a column of the history")
        rows = self.history[self.history["split"] == split].dropna(subset=[term]).sort_values("step")
        return rows["step"].to_numpy(), rows[term].to_numpy(float)


def _read_all(source: Source | Sequence[Source], labels: Sequence[str] | None) -> list[_Curve]:
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    if labels is not None and len(labels) != len(sources):
        raise ValueError(
            f"Expected {len(sources)} labels, one for each source, got {len(labels)}. Name each source once."
        )
    if labels is None:
        labels = [_name(one, at) for at, one in enumerate(sources)] if len(sources) > 1 else ["train"]
    return [_Curve(label, _history(one)) for one, label in zip(sources, labels, strict=True)]


def _name(source: Source, at: int) -> str:
    return Path(source).name if isinstance(source, (str, PathLike)) else f"run {at + 1}"


def _history(source: Source) -> pd.DataFrame:
    """Return the history of one source."""
    if isinstance(source, pd.DataFrame):
        history = source
    elif isinstance(source, AnnData):
        history = _recorded_history(source)
    elif isinstance(source, (str, PathLike)):
        history = _read_run(Path(source))
    else:
        history = getattr(source, "history", None)
    if history is None or not len(history):
        raise ValueError(
            f"Expected a training history with at least one logged step, but the {type(source).__name__} has none. "
            "Pass a trained model or its run directory."
        )
    for column in ("step", "split", "loss"):
        if column not in history:
            raise missing_key(column, history.columns, "a column of the history")
    return history


def _recorded_history(adata: AnnData) -> pd.DataFrame:
    written: Mapping = adata.uns.get(_keys.UNS, {})
    for verb in _TRAINED_BY:
        if "table" in written.get(verb, {}):
            return written[verb]["table"]
    advice = "Call scllm.tl.pretrain(adata) first, or pass the run directory."
    raise missing_key(_TRAINED_BY[0], written, "in adata.uns['scllm']", advice)


def _read_run(path: Path) -> pd.DataFrame | None:
    file = path / "history.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected a run directory with a history.jsonl, but {str(file)!r} does not exist. Check the path."
        )
    return read_history(file)


def _loss_terms(curves: Sequence[_Curve]) -> list[str]:
    """Return the loss and its terms; a single term that equals the loss is not drawn twice."""
    columns = dict.fromkeys(
        name for curve in curves for name in curve.history.columns if not name.startswith(_NO_LOSSES)
    )
    terms = [name for name in columns if all(name in curve.history for curve in curves) and name != "loss"]
    told = [name for name in terms if not all(_same(curve.history, name) for curve in curves)]
    return ["loss", *told]


def _same(history: pd.DataFrame, term: str) -> bool:
    return np.allclose(history[term].to_numpy(float), history["loss"].to_numpy(float), equal_nan=True)


def _draw(ax: Axes, curve: _Curve, term: str, hues: tuple[str, str], smooth: int | None, perplexity: bool) -> None:
    """Draw both splits of one source in one panel; several sources have one colour each, a single one has two."""
    scale = np.exp if perplexity else np.asarray
    alone = hues[0] != hues[1]
    steps, values = curve.points(term, "train")
    window = max(1, len(steps) // _POINTS_PER_WINDOW) if smooth is None else max(1, smooth)
    # averaged before exp, because the perplexity of several batches is that of their mean loss
    mean = pd.Series(values).rolling(window, center=True, min_periods=1).mean().to_numpy()
    if window > 1:
        ax.plot(steps, scale(values), color=hues[0], linewidth=0.7, alpha=0.25 if alone else 0.12, label="_logged")
    ax.plot(steps, scale(mean), color=hues[0], linewidth=1.8, label=curve.label)
    steps, values = curve.points(term, "validation")
    if not len(steps):
        return
    dashes = "-" if alone else _VALIDATION_DASHES
    line = {"color": hues[1], "marker": "o", "markersize": 3.5, "linewidth": 1.3, "zorder": 3}
    ax.plot(steps, scale(values), linestyle=dashes, label="validation" if alone else "_validation", **line)
    best_step = _best_step(curve)
    for value in scale(values[steps == best_step][:1]):
        label = f"best: {value:.3g} at step {best_step:,}" if alone else "_best"
        ring = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": hues[1], "markeredgewidth": 1.6}
        ax.plot([best_step], [value], marker="o", linestyle="none", zorder=4, label=label, **ring)


def _draw_mean_prediction(ax: Axes, curves: Sequence[_Curve], term: str, perplexity: bool) -> None:
    """Draw the loss of predictions that ignore the cell, which differs between sources with other cells or masks."""
    name = "mean_prediction" if term == "loss" else f"mean_prediction_{term}"
    found = pd.concat([curve.history[name] for curve in curves if name in curve.history] or [pd.Series(dtype=float)])
    for number, value in enumerate(sorted(found.dropna().unique())):
        level = np.exp(value) if perplexity else value
        label = "_mean prediction" if number else "mean prediction"
        ax.axhline(level, color=GREY, linewidth=1.2, linestyle="--", zorder=1, label=label)


def _best_step(curve: _Curve) -> int:
    """Return the step with the lowest validation loss."""
    steps, losses = curve.points("loss", "validation")
    return int(steps[np.argmin(losses)]) if len(steps) else -1


def _mark_epochs(ax: Axes, histories: Sequence[pd.DataFrame]) -> None:
    """Draw a faint line at the beginning of epochs, thinned out if there are many; none if sources differ in them."""
    if not all("epoch" in history for history in histories):
        return
    first, *others = (history[history["split"] == "train"].groupby("epoch")["step"].min() for history in histories)
    if not all(first.equals(other) for other in others):
        return
    starts = first.sort_values()
    for epoch, step in starts.iloc[1 :: -(-len(starts) // _MAX_EPOCH_MARKS)].items():
        ax.axvline(step, color="#C8C8C8", linewidth=0.8, linestyle=":", zorder=0)
        ax.annotate(
            f"epoch {epoch:g}" if step == starts.iloc[1] else f"{epoch:g}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize="x-small",
            color=GREY,
        )
