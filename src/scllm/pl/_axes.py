"""Shared by all plots: make axes, remove clutter, show or return the figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

__all__ = ["COLORS", "GREY", "AxesArray", "axis_grid", "colors", "one_axis", "show_or_return", "tidy"]

AxesArray: TypeAlias = NDArray[np.object_]
Drawn = TypeVar("Drawn", Axes, AxesArray)

# colours of Okabe and Ito, distinct for any colour vision; blue and vermilion first, because most plots need two
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
GREY = "#767676"

_STATIC_BACKENDS = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})


def one_axis(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    """Return ``ax``, or the axes of a new figure."""
    return plt.subplots(figsize=figsize, layout="constrained")[1] if ax is None else ax


def axis_grid(
    ax: Axes | Sequence[Axes] | AxesArray | None,
    n_panels: int,
    figsize: tuple[float, float],
    *,
    n_columns: int | None = None,
    width_ratios: Sequence[float] | None = None,
) -> AxesArray:
    """Return one axes for each panel, ``(n_panels,)``: those passed, or those of a new figure."""
    if ax is not None:
        given = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
        if len(given) != n_panels:
            raise ValueError(
                f"Expected {n_panels} axes in ax=, one for each panel, got {len(given)}. Pass as many, or leave ax out."
            )
        return given
    n_columns = n_columns or n_panels
    n_rows = -(-n_panels // n_columns)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=figsize, width_ratios=width_ratios, layout="constrained", squeeze=False
    )
    for unused in axes.ravel()[n_panels:]:
        figure.delaxes(unused)
    return axes.ravel()[:n_panels]


def tidy(ax: Axes, *, grid: str | None = None) -> None:
    """Remove the upper and right border, and draw faint grid lines along one axis if requested."""
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(axis=grid, color="#E6E6E6", linewidth=0.7)
        ax.set_axisbelow(True)


def colors(n: int) -> list[str]:
    """Return ``n`` distinct colours; more than eight are shades of one colour map."""
    if n <= len(COLORS):
        return list(COLORS[:n])
    return [mpl.colors.to_hex(mpl.colormaps["viridis"](at)) for at in np.linspace(0, 0.95, n)]


def show_or_return(drawn: Drawn, show: bool | None) -> Drawn | None:
    """Show the figure, or return what was drawn; ``show=None``: show it if there is a screen."""
    if show is None:
        show = mpl.get_backend().lower() not in _STATIC_BACKENDS
    if not show:
        return drawn
    plt.show()
    return None
