"""Plot networks of genes, and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from scllm import _keys
from scllm._checks import missing_key
from scllm._results import recorded
from scllm._typing import FloatArray
from scllm.pl._axes import COLORS, one_axis, show_or_return

__all__ = ["attention", "grn"]

_MOST_GENES = 30


def grn(
    adata: AnnData,
    *,
    kind: Literal["network", "heatmap"] = "network",
    key: str = _keys.GRN,
    group: str | None = None,
    genes: Sequence[str] | None = None,
    n_edges: int = 60,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Plot the strongest edges of a network as arrows or as a heat map.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.infer_grn``.
    kind
        ``"network"``: genes on a plane, edges as arrows, blue if positive and orange if negative; ``"heatmap"``: the
        weights, sources as rows.
    key
        ``key_added`` of ``scllm.tl.infer_grn``.
    group
        Group of cells; ``None``: the first.
    genes
        Genes to show. ``None``: those of the strongest edges.
    n_edges
        Number of edges to show.
    ax
        Axes to draw on. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes, if the figure is not shown.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=20, n_genes=20)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.infer_grn(adata, model, n_edges=3)
    >>> len(scllm.pl.grn(adata, n_edges=10, show=False).texts) > 3
    True
    """
    if kind not in ("network", "heatmap"):
        raise ValueError(f"Expected kind to be 'network' or 'heatmap', got {kind!r}. Pass one of these.")
    entry = recorded(adata, _keys.safe(key), made_by="scllm.tl.infer_grn(adata, ...)")
    edges = _edges(entry["table"], group, genes, n_edges)
    if kind == "heatmap":
        ax = one_axis(ax, (6.0, 5.2))
        _draw_heatmap(ax, edges)
    else:
        ax = one_axis(ax, (6.0, 6.0))
        _draw_network(ax, edges, is_directed=str(entry["params"]["method"]) != "similarity")
    return show_or_return(ax, show)


def attention(
    adata: AnnData,
    *,
    gene: str,
    key: str = _keys.GRN,
    n_genes: int = 20,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Plot which genes attend most to a gene, for each group of cells.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.infer_grn(method="attention")``.
    gene
        The gene that is attended to (source).
    key
        ``key_added`` of ``scllm.tl.infer_grn``.
    n_genes
        Number of genes to show.
    ax
        Axes to draw on. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes, if the figure is not shown.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=20, n_genes=20)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.infer_grn(adata, model, n_edges=3)
    >>> scllm.pl.attention(adata, gene="gene0", show=False).get_title()
    'attention to gene0'
    """
    entry = recorded(adata, _keys.safe(key), made_by="scllm.tl.infer_grn(adata, method='attention')")
    method = str(entry["params"]["method"])
    if method != "attention":
        raise ValueError(f"Expected a network of attention in uns[{key!r}], got one of {method!r}. Use pl.grn.")
    table = entry["table"].astype({"source": str, "target": str, "group": str})
    if gene not in set(table["source"]):
        raise missing_key(gene, sorted(set(table["source"])), "a source of the network")
    wide = table[table["source"] == gene].pivot(index="target", columns="group", values="weight")
    order = wide.abs().max(axis=1).sort_values(ascending=False, kind="stable").index[:n_genes]
    wide = wide.loc[order]
    ax = one_axis(ax, (1.8 + 0.8 * wide.shape[1], 0.9 + 0.26 * len(wide)))
    is_contrast = "control" in entry["params"]
    _draw_matrix(ax, wide, "difference of attention rank" if is_contrast else "mean attention rank", is_contrast)
    ax.set_title(f"attention to {gene}", fontsize="medium")
    return show_or_return(ax, show)


def _edges(table: pd.DataFrame, group: str | None, genes: Sequence[str] | None, n: int) -> pd.DataFrame:
    """Return the strongest edges of one group."""
    if n < 1:
        raise ValueError(f"Expected n_edges of at least 1, got {n}. Pass 60.")
    table = table.astype({"source": str, "target": str, "group": str})
    names = list(dict.fromkeys(table["group"]))
    if group is not None and group not in names:
        raise missing_key(group, names, "a group of the network")
    if not names:
        raise ValueError(
            "Expected a network with edges, got none. Infer it with another method, or from a model that was trained "
            "longer."
        )
    table = table[table["group"] == (group or names[0])]
    if genes is not None:
        unknown = sorted(set(genes) - set(table["source"]) - set(table["target"]))
        if unknown:
            raise missing_key(unknown[0], sorted({*table["source"], *table["target"]}), "a gene of the network")
        table = table[table["source"].isin(genes) & table["target"].isin(genes)]
    return table.iloc[np.argsort(-table["weight"].abs().to_numpy(float), kind="stable")[:n]]


def _draw_network(ax: Axes, edges: pd.DataFrame, *, is_directed: bool) -> None:
    if not is_directed:  # both directions are one link
        ends = pd.Series([tuple(sorted(pair)) for pair in zip(edges["source"], edges["target"], strict=True)])
        edges = edges[~ends.duplicated().to_numpy()]
    names = sorted({*edges["source"], *edges["target"]})
    place = dict(zip(names, _layout(edges, names), strict=True))
    strongest = edges["weight"].abs().max()
    for edge in edges.itertuples():
        style = {
            "arrowstyle": "-|>" if is_directed else "-",
            "color": COLORS[0] if edge.weight > 0 else COLORS[1],
            "alpha": 0.25 + 0.6 * abs(edge.weight) / strongest,
            "shrinkA": 9,
            "shrinkB": 9,
            "linewidth": 1.2,
            "connectionstyle": "arc3,rad=0.08",
        }
        ax.annotate("", place[edge.target], place[edge.source], arrowprops=style)
    at = np.array(list(place.values()))
    ax.scatter(*at.T, s=40, color="#444444", zorder=3)
    for name, (x, y) in place.items():
        ax.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="small", zorder=4)
    ax.margins(0.12)
    ax.set_axis_off()


def _layout(edges: pd.DataFrame, names: list[str]) -> FloatArray:
    """Place genes by forces: linked genes attract, all repel (Fruchterman and Reingold 1991)."""
    number = {name: i for i, name in enumerate(names)}
    link = np.zeros((len(names),) * 2)
    for a, b in zip(edges["source"], edges["target"], strict=True):
        link[number[a], number[b]] = link[number[b], number[a]] = 1
    rng = np.random.default_rng(0)
    at, ideal = rng.normal(size=(len(names), 2)), 1 / np.sqrt(len(names))
    for heat in np.linspace(0.2, 0.005, 300):
        apart = at[:, None] - at[None]
        far = np.maximum(np.linalg.norm(apart, axis=2), 1e-3)[..., None]
        force = (apart / far * (ideal**2 / far - link[..., None] * far**2 / ideal)).sum(1) - at
        length = np.maximum(np.linalg.norm(force, axis=1, keepdims=True), 1e-9)
        at = at + force / length * np.minimum(length, heat)
    return at


def _draw_heatmap(ax: Axes, edges: pd.DataFrame) -> None:
    wide = edges.pivot(index="source", columns="target", values="weight")
    wide = wide.iloc[:_MOST_GENES, :]
    _draw_matrix(ax, wide, "weight", bool((edges["weight"] < 0).any()))
    ax.set(xlabel="target", ylabel="source")


def _draw_matrix(ax: Axes, wide: pd.DataFrame, label: str, is_signed: bool) -> None:
    values = wide.to_numpy(float)
    limit = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 1.0
    low = -limit if is_signed else np.nanmin(values)
    colors = mpl.colormaps["RdBu_r" if is_signed else "Blues"].with_extremes(bad="#F0F0F0")
    image = ax.imshow(values, cmap=colors, vmin=low, vmax=limit, aspect="auto", interpolation="none")
    ax.set_xticks(range(wide.shape[1]), wide.columns.astype(str), rotation=90, fontsize="small")
    ax.set_yticks(range(wide.shape[0]), wide.index.astype(str), fontsize="small")
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.7)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
