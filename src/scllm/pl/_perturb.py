"""Plot in-silico perturbations and predicted changes."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from scipy.spatial import cKDTree

from scllm import _keys
from scllm._checks import embedding, missing_key
from scllm._results import recorded
from scllm._typing import FloatArray
from scllm.pl._axes import COLORS, GREY, one_axis, show_or_return, tidy

__all__ = ["perturbation"]

Kind = Literal["volcano", "ranked", "field", "change"]
_FDR, _NAMED = 0.05, 10


def perturbation(
    adata: AnnData,
    *,
    kind: Kind = "volcano",
    key: str = _keys.PERTURB,
    group: str | None = None,
    state: str | None = None,
    basis: str = "X_umap",
    perturbation: str | None = None,
    n_names: int = _NAMED,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Plot the shifts of perturbations, or predicted against measured changes.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.perturb``; for ``kind="change"`` after ``scllm.tl.predict_perturbation(truth=...)``,
        which writes the measured changes.
    kind
        What to draw:

        - ``"volcano"``: shift against its p-value; significant perturbations are coloured.
        - ``"ranked"``: the largest shifts with their 95 % intervals, and the null distribution as a band.
        - ``"field"``: how cells move on ``obsm[basis]`` after the perturbation that is shown.
        - ``"change"``: predicted against measured change of each gene.
    key
        ``key_added`` of ``scllm.tl.perturb``.
    group
        Group of cells; ``None``: the first.
    state
        State that cells may move to; ``None``: the first.
    basis
        Two-dimensional embedding for ``"field"``.
    perturbation
        Perturbation whose changes are drawn; ``None``: the first.
    n_names
        Number of perturbations or genes that are named.
    ax
        Axes to draw on. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes, if the figure is not shown.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=20, n_genes=30)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.perturb(adata, model, genes=["gene0", "gene1"], n_null=20)
    >>> scllm.pl.perturbation(adata, show=False).get_xlabel()
    'shift of the cell embedding'
    """
    if kind not in ("volcano", "ranked", "field", "change"):
        raise ValueError(f"Expected kind to be 'volcano', 'ranked', 'field' or 'change', got {kind!r}. Pass one.")
    if kind == "change":
        ax = one_axis(ax, (4.2, 4.0))
        _draw_change(ax, adata, perturbation, n_names)
        return show_or_return(ax, show)
    entry = recorded(adata, _keys.safe(key), made_by="scllm.tl.perturb(adata, genes=...)")
    if kind == "field":
        ax = one_axis(ax, (4.6, 4.2))
        _draw_field(ax, adata, entry, key, basis)
        return show_or_return(ax, show)
    table = _chosen(entry["table"], group, state)
    ax = one_axis(
        ax, (5.0, 4.0) if kind == "volcano" else (4.8, 1.1 + 0.28 * min(int((~table["is_null"]).sum()), 2 * n_names))
    )
    (_draw_volcano if kind == "volcano" else _draw_ranked)(ax, table, n_names)
    return show_or_return(ax, show)


def _chosen(table: pd.DataFrame, group: str | None, state: str | None) -> pd.DataFrame:
    """Return the rows of one group and state."""
    for column, name in (("group", group), ("state", state)):
        if column not in table:
            continue
        names = list(dict.fromkeys(table[column].astype(str)))
        if name is not None and name not in names:
            raise missing_key(name, names, f"a {column} of the table")
        table = table[table[column].astype(str) == (name or names[0])]
    return table.dropna(subset=[_shift(table)])


def _shift(table: pd.DataFrame) -> str:
    return "goal_shift" if "goal_shift" in table else "cell_shift"


def _label(table: pd.DataFrame) -> str:
    if "goal_shift" not in table:
        return "shift of the cell embedding"
    return f"shift towards {table['state'].iloc[0]} (change of cosine similarity)"


def _draw_volcano(ax: Axes, table: pd.DataFrame, n_names: int) -> None:
    shift = table[_shift(table)].to_numpy()
    height = -np.log10(table["p_value"].to_numpy(float).clip(min=1e-300))
    is_null, is_clear = table["is_null"].to_numpy(bool), table["q_value"].to_numpy(float) < _FDR
    parts = (
        (is_null, "#CCCCCC", "null genes"),
        (~is_null & ~is_clear, GREY, "not significant"),
        (~is_null & is_clear, COLORS[1], f"significant (FDR {_FDR:.0%})"),
    )
    for part, color, label in parts:
        if part.any():
            ax.scatter(shift[part], height[part], s=18, color=color, label=label, linewidths=0)
    asked = np.flatnonzero(~is_null & np.isfinite(height))
    for row in asked[np.argsort(-height[asked], kind="stable")][:n_names]:
        _name(ax, table["perturbation"].iloc[row], shift[row], height[row])
    ax.margins(0.12)
    ax.set(xlabel=_label(table), ylabel="$-\\log_{10}$ p-value")
    ax.legend(frameon=False, fontsize="small")
    tidy(ax)


def _name(ax: Axes, text: str, x: float, y: float) -> None:
    ax.annotate(text, (x, y), xytext=(3, 3), textcoords="offset points", fontsize="small", annotation_clip=True)


def _draw_ranked(ax: Axes, table: pd.DataFrame, n_names: int) -> None:
    column = _shift(table)
    asked = table[~table["is_null"]].sort_values(column, ascending=False)
    shown = asked if len(asked) <= 2 * n_names else pd.concat([asked.head(n_names), asked.tail(n_names)])
    place = np.arange(len(shown))
    if table["is_null"].any():
        low, high = table.loc[table["is_null"], column].quantile([0.025, 0.975])
        ax.axvspan(low, high, color="#E6E6E6", linewidth=0, label="95 % of null genes")
        ax.legend(frameon=False, fontsize="small", loc="lower right")
    colors = np.where(shown["q_value"].to_numpy(float) < _FDR, COLORS[1], GREY)
    if "low" in shown:
        ax.hlines(place, shown["low"], shown["high"], color=colors, linewidth=1.5)
    ax.scatter(shown[column], place, color=colors, s=26, zorder=3)
    ax.axvline(0, color="#999999", linewidth=0.8)
    ax.set_yticks(place, shown["perturbation"].astype(str))
    ax.set(xlabel=_label(table), ylim=(len(shown) - 0.5, -0.5))
    tidy(ax, grid="x")


def _draw_field(ax: Axes, adata: AnnData, entry: dict[str, Any], key: str, basis: str) -> None:
    """Move each cell to the mean place of the cells whose embedding is nearest to its own after the perturbation."""
    name = _keys.safe(_keys.PERTURBED + key)
    after = embedding(adata, name)
    before = embedding(adata, name + _keys.UNPERTURBED)
    place = embedding(adata, basis, advice="Call sc.tl.umap(adata) first.")[:, :2]
    near = cKDTree(before).query(after, k=min(15, len(before)))[1].reshape(len(after), -1)
    own = cKDTree(before).query(before, k=min(15, len(before)))[1].reshape(len(before), -1)
    move = place[near].mean(1) - place[own].mean(1)
    ax.scatter(*place.T, s=8, color="#D0D0D0", linewidths=0)
    grid, arrows = _on_grid(place, move)
    ax.quiver(*grid.T, *arrows.T, angles="xy", color=COLORS[0], width=0.005)
    ax.set(xticks=[], yticks=[], xlabel=f"{basis} 1", ylabel=f"{basis} 2")
    ax.set_title(f"{entry['params']['shown']}: {entry['params']['mode']}", fontsize="medium")
    tidy(ax)


def _on_grid(place: FloatArray, move: FloatArray, n: int = 14) -> tuple[FloatArray, FloatArray]:
    """Average moves over the cells in each square of a grid; squares with a single cell are left out."""
    low, size = place.min(0), np.ptp(place, axis=0).max() / n or 1.0
    square = ((place - low) // size).astype(int)
    _, which, n_cells = np.unique(square, axis=0, return_inverse=True, return_counts=True)
    which = which.ravel()
    means = [np.stack([np.bincount(which, v) / n_cells for v in values.T], axis=1) for values in (place, move)]
    return means[0][n_cells > 1], means[1][n_cells > 1]


def _draw_change(ax: Axes, adata: AnnData, name: str | None, n_names: int) -> None:
    entry = recorded(adata, "predict_perturbation", made_by="scllm.tl.predict_perturbation(adata, genes=...)")
    table = entry["changes"]
    if "measured" not in table:
        raise missing_key(
            "measured",
            table.columns,
            "a column of adata.uns['scllm']['predict_perturbation']['changes']",
            "Pass truth= to scllm.tl.predict_perturbation.",
        )
    names = list(dict.fromkeys(table["perturbation"].astype(str)))
    if name is not None and name not in names:
        raise missing_key(name, names, "a perturbation that was predicted")
    name = name or names[0]
    table = table[table["perturbation"].astype(str) == name]
    x, y = table["measured"].to_numpy(float), table["change"].to_numpy(float)
    ax.scatter(x, y, s=14, color=COLORS[0], alpha=0.7, linewidths=0)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color="#999999", linewidth=0.8)
    for row in np.argsort(-np.abs(x), kind="stable")[:n_names]:
        _name(ax, str(table["gene"].iloc[row]), x[row], y[row])
    ax.margins(0.12)
    ax.set(xlabel="measured change (log1p)", ylabel="predicted change (log1p)")
    ax.set_title(f"{name}: correlation {np.corrcoef(x, y)[0, 1]:.2f}", fontsize="medium")
    tidy(ax)
