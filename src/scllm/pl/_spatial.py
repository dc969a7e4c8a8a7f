"""Plot measured and predicted expression over the tissue, and what a plausibility term costs and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from scipy import sparse

from scllm import _keys
from scllm._checks import missing_key
from scllm._names import listed
from scllm._results import recorded
from scllm._typing import FloatArray, IntArray
from scllm.data.source import open_source
from scllm.data.spots import sections_of, spot_pitch, spot_positions
from scllm.data.targets import dense, normalised
from scllm.pl._axes import GREY, AxesArray, axis_grid, colors, one_axis, show_or_return, tidy

__all__ = ["plausibility_tradeoff", "spatial_prediction"]

_IMAGES = {"lowres": "tissue_lowres_scalef", "hires": "tissue_hires_scalef"}
_BASELINES = {"ridge": "s", "knn": "D"}  # and their markers
_ARMS = {"ridge": "ridge regression", "knn": "nearest neighbours", "none": "no plausibility term"}


def spatial_prediction(
    adata: AnnData,
    *,
    gene: str,
    predicted: str = _keys.PREDICTED,
    truth: str | None = None,
    section: str | None = None,
    library_key: str | None = None,
    image: bool = True,
    ax: Axes | Sequence[Axes] | AxesArray | None = None,
    show: bool | None = None,
) -> AxesArray | None:
    """Plot the measured, the predicted, and the difference of a gene's expression over a tissue section.

    Measured and predicted expression have the same colour scale. In the difference, blue spots are predicted too low
    and red ones too high.

    Parameters
    ----------
    adata
        Spots by genes, with ``obsm["spatial"]``.
    gene
        Gene to plot.
    predicted
        Layer with predictions.
    truth
        Layer with measured expression. ``None``: ``X``. Counts are log-normalised, as in
        ``scllm.tl.evaluate_spatial``.
    section
        Section to plot. ``None``: the first one.
    library_key
        Column of ``obs`` that names the section of each spot. ``None``: the column whose values are the keys of
        ``uns["spatial"]``, or one section if it has at most one key.
    image
        Whether to draw the histology image of ``uns["spatial"]`` below the spots, if there is one.
    ax
        Three axes to draw on. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The three axes, if the figure is not shown.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=1, side=6)
    >>> adata.layers["predicted"] = adata.X.copy()
    >>> [ax.get_title() for ax in scllm.pl.spatial_prediction(adata, gene="gene0", truth=None, show=False)]
    ['measured', 'predicted', 'predicted - measured']
    """
    libraries = adata.uns.get(_keys.SPATIAL, {})
    of_spot = sections_of(adata.obs, libraries, library_key)
    names = list(dict.fromkeys(of_spot))
    section = names[0] if section is None else section
    if section not in names:
        raise missing_key(section, names, "a section of these spots")
    spots = np.flatnonzero(of_spot == section)
    true, guess = _values(adata, gene, spots, truth, predicted)
    xy = spot_positions(adata.obsm, adata.obs_names)[spots]
    axes = axis_grid(ax, 3, (12.6, 4.0))
    lowest, highest = min(true.min(), guess.min()), max(true.max(), guess.max())
    far = float(np.abs(guess - true).max()) or 1.0
    panels = (
        ("measured", true, "viridis", (lowest, highest)),
        ("predicted", guess, "viridis", (lowest, highest)),
        ("predicted - measured", guess - true, "RdBu_r", (-far, far)),
    )
    for panel, (title, values, colormap, limits) in zip(axes, panels, strict=True):
        _draw_spots(panel, xy, values, colormap, limits, libraries.get(section) if image else None)
        panel.set_title(title, fontsize="medium")
    axes[0].set_ylabel(f"{gene}, {section}")
    return show_or_return(axes, show)


def plausibility_tradeoff(
    adata: AnnData | pd.DataFrame,
    *,
    n_train_groups: int | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Plot correlation with the truth against the error of gene-gene correlations, for each arm of an ablation.

    Better predictors are further right and lower. Bars are 95 % intervals of the difference from the predictor without
    plausibility term, whose scores are the dashed lines. Baselines are grey. The mean profile is left out, because its
    correlation is 0.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.ablate_spatial``, or the table that it returned.
    n_train_groups
        Number of training sections. ``None``: the largest.
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
    >>> row = {"n_train_groups": 1, "arm": "none", "pcc": 0.3, "correlation_error": 0.4}
    >>> scllm.pl.plausibility_tradeoff(pd.DataFrame([row]), show=False).get_xlabel()
    'mean correlation of genes with measured expression'
    """
    if isinstance(adata, AnnData):
        table = recorded(adata, "ablate_spatial", made_by="scllm.tl.ablate_spatial(adata, lm=...)")["table"]
    else:
        table = adata
    for name in ("arm", "pcc", "correlation_error", "n_train_groups"):
        if name not in table:
            raise missing_key(name, table.columns, "a column of the table", "Pass the table of tl.ablate_spatial.")
    there = sorted(set(table["n_train_groups"].astype(int)))
    chosen = there[-1] if n_train_groups is None else n_train_groups
    if chosen not in there:
        raise ValueError(f"Expected n_train_groups to be one of {there}, got {chosen}. Pass one of them.")
    table = table[(table["n_train_groups"] == chosen) & (table["arm"].astype(str) != "mean")]
    ax = one_axis(ax, (6.4, 4.6))
    terms = [arm for arm in table["arm"].astype(str) if arm not in _BASELINES]
    hues = dict(zip(terms, colors(max(2, len(terms))), strict=False))
    for row in table.to_dict("records"):
        _draw_arm(ax, row, hues.get(str(row["arm"]), GREY))
    plain = table[table["arm"].astype(str) == "none"]
    if len(plain):
        ax.axvline(plain["pcc"].iloc[0], color="#BBBBBB", linewidth=0.8, linestyle="--", zorder=0)
        ax.axhline(plain["correlation_error"].iloc[0], color="#BBBBBB", linewidth=0.8, linestyle="--", zorder=0)
    ax.set_xlabel("mean correlation of genes with measured expression")
    ax.set_ylabel("error of gene-gene correlations (r.m.s.)")
    ax.set_title(f"{chosen} training section{'s' if chosen != 1 else ''}", fontsize="medium")
    ax.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(ax)
    return show_or_return(ax, show)


def _values(
    adata: AnnData, gene: str, spots: IntArray, truth: str | None, predicted: str
) -> tuple[FloatArray, FloatArray]:
    """Return measured and predicted expression of a gene in some spots."""
    if gene not in adata.var_names:
        raise missing_key(gene, adata.var_names, "in adata.var_names")
    if predicted not in adata.layers:
        raise missing_key(predicted, adata.layers, "in adata.layers", "Call scllm.tl.predict_spatial(adata) first.")
    column = np.array([adata.var_names.get_loc(gene)])
    true = dense(normalised(open_source(adata, layer=truth), spots), column)[:, 0]
    values = adata.layers[predicted][spots]
    guess = dense(values.tocsr(), column)[:, 0] if sparse.issparse(values) else np.asarray(values)[:, column[0]]
    if not np.isfinite(guess).all():
        known = adata.var_names[np.isfinite(np.asarray(adata.layers[predicted][spots[0]])).ravel()]
        raise ValueError(
            f"Expected predictions of {gene!r} in layers[{predicted!r}], but it was not predicted. Pass one of the "
            f"{len(known)} genes that were: {listed(known)}."
        )
    return true, guess


def _draw_spots(
    ax: Axes, xy: FloatArray, values: FloatArray, colormap: str, limits: tuple[float, float],
    library: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    """Draw spots as circles over the image, in pixels of the full-size image."""
    factors, images = (library or {}).get("scalefactors", {}), (library or {}).get("images", {})
    level = next((name for name in _IMAGES if name in images and _IMAGES[name] in factors), None)
    pitch = spot_pitch(xy)
    low, high = xy.min(0) - 1.5 * pitch, xy.max(0) + 1.5 * pitch
    if level is not None:
        height, width = images[level].shape[:2]
        scale = float(factors[_IMAGES[level]])
        ax.imshow(images[level], extent=(0, width / scale, height / scale, 0), alpha=0.6)
    drawn = ax.scatter(
        xy[:, 0], xy[:, 1], c=values, cmap=colormap, vmin=limits[0], vmax=limits[1], s=10, linewidths=0
    )  # fmt: skip
    ax.set_xlim(low[0], high[0])
    ax.set_ylim(high[1], low[1])
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    _fill(ax, drawn, pitch, high - low)
    ax.figure.colorbar(drawn, ax=ax, shrink=0.7, label="log-normalised expression")


def _fill(ax: Axes, drawn: Any, pitch: float, extent: FloatArray) -> None:
    """Make spots about half as wide as their distance, whatever the size of the axes."""
    box = ax.get_position()
    inches = min(box.width * ax.figure.get_figwidth() / extent[0], box.height * ax.figure.get_figheight() / extent[1])
    drawn.set_sizes([max(2.0, (0.75 * pitch * inches * 72) ** 2)])


def _draw_arm(ax: Axes, row: Mapping[str, Any], color: str) -> None:
    """Draw one arm, with the interval of its difference from the predictor without plausibility term."""
    name = str(row["arm"])
    bars = {}
    for axis, score in (("xerr", "pcc"), ("yerr", "correlation_error")):
        low, middle, high = (row.get(f"{score}_{part}", np.nan) for part in ("low", "difference", "high"))
        if low == low and middle == middle and high == high:
            bars[axis] = np.array([[max(0.0, middle - low)], [max(0.0, high - middle)]])
    marker = _BASELINES.get(name, "o")
    ax.errorbar(
        row["pcc"], row["correlation_error"], **bars, fmt=marker, color=color, markersize=6, elinewidth=0.8,
        label=_ARMS.get(name, name), markerfacecolor=color if name not in _BASELINES else "white",
    )  # fmt: skip
