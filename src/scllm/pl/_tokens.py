"""Plot gene coverage, expression bins and reconstruction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from scipy import sparse

from scllm import _keys
from scllm._checks import groups, missing_key
from scllm._results import recorded
from scllm._typing import CSR
from scllm.pl._axes import COLORS, GREY, AxesArray, axis_grid, one_axis, show_or_return, tidy

__all__ = ["bin_distribution", "gene_coverage", "reconstruction"]

_LOST = "#D9D9D9"
_MAX_HISTOGRAM_BINS = 64


def gene_coverage(
    adata: AnnData,
    *,
    n_lost: int = 15,
    ax: Sequence[Axes] | AxesArray | None = None,
    show: bool | None = None,
) -> AxesArray | None:
    """Plot the fraction of genes that a model knows, and the most expressed genes that it does not know.

    Many unmatched genes of low expression are normal. If known markers are among the most expressed unmatched genes,
    check the gene names.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.pp.match_genes``.
    n_lost
        Number of unmatched genes to show.
    ax
        Axes to draw on, one per panel. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    Both axes, if the figure is not shown.

    Examples
    --------
    >>> import scllm
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.match_genes(adata, list(adata.var_names[10:]))
    >>> len(scllm.pl.gene_coverage(adata, show=False))
    2
    """
    match = recorded(adata, "match_genes", made_by="scllm.pp.match_genes(adata, vocab)")
    lost = match["table"].nlargest(n_lost, "mean_expression")
    axes = axis_grid(ax, 2, (8.2, max(2.4, 0.8 + 0.2 * len(lost))), width_ratios=(1.25, 1))
    _draw_shares(axes[0], match)
    axes[1].barh(lost["gene"].astype(str), lost["mean_expression"], color=COLORS[1], height=0.7)
    axes[1].invert_yaxis()
    axes[1].set(xlabel="mean expression", title="most expressed unmatched genes" if len(lost) else "all genes matched")
    axes[1].tick_params(axis="y", length=0, labelsize="small")
    tidy(axes[1], grid="x")
    if not len(lost):
        axes[1].set(xticks=[], yticks=[], xlabel="")
    return show_or_return(axes, show)


def bin_distribution(
    adata: AnnData,
    *,
    layer: str = _keys.BINNED,
    group_key: str | None = None,
    ax: Sequence[Axes] | AxesArray | None = None,
    show: bool | None = None,
) -> AxesArray | None:
    """Plot the frequency of each expression bin, with the zero bin in a separate panel.

    Bins of equal size would give a flat distribution. Peaks are ties: most counts are 1, and equal counts of a cell
    share a bin.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.pp.bin_expression``.
    layer
        Layer with the bins.
    group_key
        Column of ``obs`` with groups; each group gets a row.
    ax
        Axes to draw on, one per panel. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    Both axes, if the figure is not shown.

    Examples
    --------
    >>> import scllm
    >>> adata = scllm.datasets.toy()
    >>> scllm.pp.bin_expression(adata)
    >>> len(scllm.pl.bin_distribution(adata, show=False))
    2
    """
    bins = _layer(adata, layer, advice="scllm.pp.bin_expression(adata) writes 'binned'.")
    n_bins = int(bins.data.max(initial=1)) + 1
    parts = _cells_by_group(adata, group_key)
    counts = np.array([_count_bins(bins[cells], n_bins) for cells in parts.values()])  # (n_groups, n_bins)
    zero_share = counts[:, 0] / counts.sum(axis=1)
    share = counts[:, 1:] / np.maximum(1, counts[:, 1:].sum(axis=1, keepdims=True))
    edges = np.arange(1, n_bins + 1) - 0.5
    if group_key is None:
        axes = axis_grid(ax, 2, (8, 3.2), width_ratios=(1, 6))
        axes[0].bar([0], zero_share, color=GREY, width=0.6)
        axes[0].set(xticks=[], xlabel="zero bin", ylabel="fraction of all entries", xlim=(-0.6, 0.6), ylim=(0, 1))
        axes[1].stairs(share[0], edges, fill=True, color=COLORS[0])
        axes[1].set(ylabel="fraction of expressed entries")
        axes[1].set_ylim(bottom=0)
        for panel in axes:
            tidy(panel, grid="y")
    else:
        axes = axis_grid(ax, 2, (8.5, 1.2 + 0.27 * len(parts)), width_ratios=(1, 3.5))
        _draw_groups(axes, list(parts), zero_share, share, edges)
    axes[1].set(xlabel="bin", xlim=edges[[0, -1]])
    return show_or_return(axes, show)


def reconstruction(
    adata: AnnData,
    *,
    layer: str = _keys.RECONSTRUCTED,
    truth: str | None = "target",
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes | None:
    """Draw predicted against true expression as a density, with the mean prediction of each true value.

    Only entries that ``layer`` stores are compared. A perfect model lies on the dashed line. A flatter line
    means that predictions are close to the mean.

    Parameters
    ----------
    adata
        An AnnData after ``scllm.tl.reconstruct``.
    layer
        Layer with predictions.
    truth
        ``"target"``: the targets of the predictions, in the model's unit, as ``scllm.tl.reconstruct`` writes them.
        Otherwise the name of a layer. ``None``: ``X``.
    ax
        Axes to draw on. ``None``: a new figure.
    show
        Whether to show the figure. ``None``: only if there is a screen.

    Returns
    -------
    The axes, if the figure is not shown.

    Examples
    --------
    >>> import scllm
    >>> adata = scllm.datasets.toy()
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.reconstruct(adata, model, mask_ratio=0.5)
    >>> scllm.pl.reconstruction(adata, show=False).get_ylabel()
    'predicted (reconstructed)'
    """
    predicted = _layer(adata, layer, advice="scllm.tl.reconstruct(adata) writes 'reconstructed'.")
    if not predicted.nnz:
        raise ValueError(
            f"Expected predictions in layer {layer!r}, got a matrix without entries. Call scllm.tl.reconstruct(adata) "
            "again."
        )
    if truth == "target" and truth not in adata.layers:
        truth = layer + _keys.TARGET
    advice = "scllm.tl.reconstruct(adata) writes it for models that read values; or pass truth=, a layer or None for X."
    true = _values_at(predicted, _layer(adata, truth, advice=advice))
    ax = one_axis(ax, (4.6, 3.9))
    edges = _histogram_edges(true, predicted.data)
    density = np.histogram2d(true, predicted.data, bins=edges)[0].T
    mesh = ax.pcolormesh(*edges, np.ma.masked_equal(density, 0), norm=LogNorm(), cmap="Blues", rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label="entries", pad=0.02).outline.set_visible(False)
    limits = edges[0][[0, -1]]
    ax.plot(limits, limits, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    centres, means = _mean_by_bin(true, predicted.data, edges[0])
    ax.plot(centres, means, color=COLORS[1], linewidth=1.8, label="mean prediction")
    varies = np.ptp(true) > 0 and np.ptp(predicted.data) > 0
    r = np.corrcoef(true, predicted.data)[0, 1] if varies else np.nan
    ax.set(xlabel=f"true ({truth or 'X'})", ylabel=f"predicted ({layer})", xlim=limits, ylim=edges[1][[0, -1]])
    ax.set_title(f"Pearson r = {r:.2f}, {predicted.nnz:,} entries", fontsize="medium")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    tidy(ax)
    return show_or_return(ax, show)


def _draw_groups(axes: AxesArray, names: list[str], zero_share: NDArray, share: NDArray, edges: NDArray) -> None:
    """Draw one row for each group: a bar for its zeros, and coloured fields for its bins."""
    rows = np.arange(len(names))
    axes[0].barh(rows, zero_share, color=GREY, height=0.7)
    axes[0].set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xlabel="fraction of zeros")
    axes[0].set_yticks(rows, names)
    axes[0].tick_params(axis="y", length=0)
    tidy(axes[0], grid="x")
    mesh = axes[1].pcolormesh(edges, np.arange(len(names) + 1) - 0.5, share, cmap="Blues", vmin=0, rasterized=True)
    axes[1].set(ylim=(len(names) - 0.5, -0.5), yticks=[])
    axes[1].spines[:].set_visible(False)
    bar = axes[1].figure.colorbar(mesh, ax=axes[1], label="fraction of expressed entries", pad=0.02)
    bar.outline.set_visible(False)


def _draw_shares(ax: Axes, match: dict) -> None:
    """Draw a stacked bar of matched and unmatched genes for the data and one for the vocabulary."""
    names = ("data", "vocabulary")
    totals = np.array([match["n_data"], match["n_vocab"]], dtype=float)
    shared = match["n_matched"] / np.maximum(totals, 1)
    ax.barh(names, shared, color=COLORS[0], height=0.5, label="matched")
    ax.barh(names, 1 - shared, left=shared, color=_LOST, height=0.5, label="not matched")
    for row, (share, total) in enumerate(zip(shared, totals, strict=True)):
        text = f"{match['n_matched']:,} of {total:,.0f} genes ({100 * share:.3g} %)"
        ax.text(0, row - 0.31, text, va="bottom", fontsize="small")
    ax.invert_yaxis()
    ax.set(
        xlim=(0, 1), xticks=[], title=f"coverage {100 * match['coverage']:.3g} % ({match['id_type']})", ylim=(1.9, -0.6)
    )
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, fontsize="small", loc="lower left", ncols=2, borderaxespad=0)
    tidy(ax)
    ax.spines[["left", "bottom"]].set_visible(False)


def _layer(adata: AnnData, layer: str | None, *, advice: str = "") -> CSR:
    if layer is not None and layer not in adata.layers:
        raise missing_key(layer, adata.layers, "in adata.layers", advice)
    if layer is not None:
        return sparse.csr_matrix(adata.layers[layer])
    if adata.X is None:
        raise ValueError("Expected expression in adata.X, got None. Set adata.X, or name a layer.")
    return sparse.csr_matrix(adata.X[:] if adata.isbacked else adata.X)


def _cells_by_group(adata: AnnData, group_key: str | None) -> dict[str, NDArray[np.intp]]:
    if group_key is None:
        return {"all": np.arange(adata.n_obs)}
    column = groups(adata.obs, group_key)
    return {name: np.flatnonzero((column == name).to_numpy()) for name in column.cat.categories}


def _count_bins(bins: CSR, n_bins: int) -> NDArray[np.int64]:
    """Count entries in each bin; entries that are not stored are in bin 0."""
    counts = np.bincount(bins.data.astype(np.int64), minlength=n_bins)
    counts[0] += np.prod(bins.shape, dtype=np.int64) - bins.nnz
    return counts


def _values_at(where: CSR, values: CSR) -> NDArray:
    """Return ``values`` at the stored positions of ``where``; 0 where nothing is stored."""
    wanted, stored = _positions(where), _positions(values)
    order = np.argsort(stored) if np.any(np.diff(stored) < 0) else np.arange(len(stored))
    at = np.searchsorted(stored, wanted, sorter=order).clip(max=max(0, len(stored) - 1))
    if not len(stored):
        return np.zeros(len(wanted))
    found = order[at]
    return np.where(stored[found] == wanted, values.data[found], 0)


def _positions(matrix: CSR) -> NDArray[np.int64]:
    """Return row x columns + column of each stored entry."""
    rows = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), np.diff(matrix.indptr))
    return rows * matrix.shape[1] + matrix.indices


def _histogram_edges(true: NDArray, predicted: NDArray) -> tuple[NDArray, NDArray]:
    """Return bin edges along both axes: one bin for each true value if these are few integers."""
    low, high = float(true.min()), float(true.max())
    step = max(1.0, np.ceil((high - low + 1) / _MAX_HISTOGRAM_BINS)) if np.all(true == np.rint(true)) else None
    along = np.arange(low - 0.5, high + step, step) if step else np.linspace(low, high + 1e-9, _MAX_HISTOGRAM_BINS + 1)
    margin = 0.5 if step else 0.0
    across = np.linspace(min(low, predicted.min()) - margin, max(high, predicted.max()) + margin, len(along))
    return along, across


def _mean_by_bin(true: NDArray, predicted: NDArray, edges: NDArray) -> tuple[NDArray, NDArray]:
    """Compute the mean true and the mean predicted value in each bin that is not empty."""
    pairs = pd.DataFrame({"true": true, "predicted": predicted})
    means = pairs.groupby(np.digitize(true, edges)).mean()
    return means["true"].to_numpy(), means["predicted"].to_numpy()
