"""Plot what compressing a model saves and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol, TypeAlias

import pandas as pd
from matplotlib.axes import Axes

from scllm.data.run_files import read_report
from scllm.pl._axes import AxesArray, axis_grid, colors, show_or_return, tidy

__all__ = ["compression"]


class HasReport(Protocol):
    """A compressed model."""

    report: pd.DataFrame | None


Source: TypeAlias = str | PathLike[str] | pd.DataFrame | HasReport


@dataclass(frozen=True)
class _Panel:
    """A column of the report and its unit; agreement has no bar for the original model."""

    title: str
    column: str
    unit: float = 1.0
    is_agreement: bool = False


_PANELS = (
    _Panel("size on disk (MB)", "bytes_on_disk", 1e6),
    _Panel("GFLOP per cell", "flops_per_cell", 1e9),
    _Panel("cells per second", "cells_per_s"),
    _Panel("cosine similarity", "cosine_mean", is_agreement=True),
    _Panel("kNN overlap", "knn_overlap", is_agreement=True),
    _Panel("fraction with same label", "same_label", is_agreement=True),
    _Panel("accuracy", "accuracy"),
)


def compression(
    source: Source | Sequence[Source],
    *,
    labels: str | Sequence[str] | None = None,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    show: bool | None = None,
) -> Axes | AxesArray | None:
    """Plot models before and after compression: size, operations, speed and agreement.

    Each measure has a panel. Grey bars are the original model, coloured bars the compressed one. For measures of
    agreement between the two, there is one bar, and a tick marks the cell with the lowest cosine similarity.
    ``accuracy`` has a panel if the report has such a column.

    Parameters
    ----------
    source
        A model from ``scllm.tl.quantize`` or ``scllm.tl.prune``, the folder of one, its ``report``, or a list of these,
        which are drawn below each other.
    labels
        Names of the sources. ``None``: the names of the folders, or numbers.
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
    >>> report = pd.DataFrame({"bytes_on_disk": [4e6, 1e6], "cosine_mean": [1, 0.9999]}, index=["before", "after"])
    >>> len(scllm.pl.compression(report, show=False))
    2
    """
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    labels = [labels] if isinstance(labels, str) else labels
    if not sources:
        raise ValueError("Expected at least one model as source, got an empty list. Pass the model from tl.quantize.")
    if labels is not None and len(labels) != len(sources):
        raise ValueError(
            f"Expected {len(sources)} labels, one for each source, got {len(labels)}. Name each source once."
        )
    reports = [_report(one) for one in sources]
    names = list(labels) if labels is not None else [_name(one, at, len(sources)) for at, one in enumerate(sources)]
    panels = [panel for panel in _PANELS if any(_has(report, panel.column) for report in reports)]
    if not panels:
        columns = [panel.column for panel in _PANELS]
        raise ValueError(
            f"Expected a report with at least one of the columns {columns}, got {list(reports[0].columns)}. Pass a "
            "model's report."
        )
    axes = axis_grid(ax, len(panels), (0.6 + 2.3 * len(panels), 1.1 + 0.75 * len(reports)))
    for axis, panel in zip(axes, panels, strict=True):
        _draw(axis, panel, reports)
        axis.set_yticks(range(len(reports)), names if axis is axes[0] else [""] * len(reports))
        axis.set_title(panel.title, fontsize="medium", loc="left")
        axis.set_ylim(len(reports) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        tidy(axis)
    return show_or_return(axes[0] if len(axes) == 1 else axes, show)


def _report(source: Source) -> pd.DataFrame:
    """Return the report of one source."""
    if isinstance(source, pd.DataFrame):
        report: pd.DataFrame | None = source
    elif isinstance(source, (str, PathLike)):
        report = read_report(Path(source) / "report.json")
    else:
        report = getattr(source, "report", None)
    if report is None or not {"before", "after"} <= set(report.index):
        seen = repr(str(source)) if isinstance(source, (str, PathLike)) else f"the {type(source).__name__}"
        raise ValueError(
            f"Expected a compression report with the rows 'before' and 'after', but {seen} has none. Pass a model from "
            "scllm.tl.quantize or scllm.tl.prune, or the folder it was saved in."
        )
    return report


def _name(source: Source, at: int, n: int) -> str:
    if isinstance(source, (str, PathLike)):
        return Path(source).name
    return "" if n == 1 else f"model {at + 1}"


def _has(report: pd.DataFrame, column: str) -> bool:
    return column in report and bool(report[column].notna().any())


def _draw(ax: Axes, panel: _Panel, reports: Sequence[pd.DataFrame]) -> None:
    """Draw bars of one measure: two for each report, or one for agreement."""
    hues = colors(max(2, len(reports)))
    highest = 0.0
    for row, report in enumerate(reports):
        if not _has(report, panel.column):
            continue
        before, after = (float(report.loc[name, panel.column]) / panel.unit for name in ("before", "after"))
        if panel.is_agreement:
            ax.barh(row, after, height=0.36, color=hues[row])
            _write(ax, after, row, f"{after:.4f}" if panel.column == "cosine_mean" else f"{after:.3f}")
            if panel.column == "cosine_mean" and _has(report, "cosine_min"):
                ax.plot([float(report.loc["after", "cosine_min"])] * 2, [row - 0.28, row + 0.28], color="black", lw=1.2)
        else:
            ax.barh(row - 0.19, before, height=0.36, color="#BBBBBB")
            ax.barh(row + 0.19, after, height=0.36, color=hues[row])
            _write(ax, before, row - 0.19, _short(before))
            _write(ax, after, row + 0.19, _with_ratio(panel, before, after))
        highest = max(highest, before, after)
    # room for the numbers next to the bars
    ax.set_xlim(0, 1.5 if panel.is_agreement else 2.0 * highest)
    ax.set_xticks([0, 1] if panel.is_agreement else [])
    ax.spines["bottom"].set_bounds(0, 1)
    ax.spines["bottom"].set_visible(panel.is_agreement)


def _with_ratio(panel: _Panel, before: float, after: float) -> str:
    """Format the value and its ratio to the original."""
    if panel.column == "accuracy" or not before or not after:
        return _short(after)
    if abs(after / before - 1) < 0.005:
        return _short(after)
    return f"{_short(after)} ({after / before:.2f}x)"


def _write(ax: Axes, x: float, y: float, text: str) -> None:
    """Write text next to the end of a bar."""
    place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center_baseline"}
    ax.annotate(text, (x, y), fontsize="small", color="#333333", **place)


def _short(value: float) -> str:
    """Format with three significant digits, or as an integer."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
