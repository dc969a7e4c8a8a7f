"""The demonstration: a tiny model on 700 real blood cells, compared with simple methods."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import typer
from anndata import AnnData
from matplotlib.axes import Axes
from sklearn.linear_model import LogisticRegression

from scllm import datasets, metrics, pl, pp, tl
from scllm._log import details
from scllm._typing import FloatArray
from scllm.models.base import CellModel

__all__ = ["demonstrate"]

_KEY = "cell_type"
_FRACTIONS = (0.7, 0.1, 0.2)
_TITLES = {"X_scllm": "scllm, pretrained without labels", "X_pca": "PCA of log-normalised counts"}
_MEASURES = {
    "nmi": "NMI of Leiden clusters",
    "ari": "ARI of Leiden clusters",
    "silhouette_label": "silhouette, 0 to 1",
    "knn_accuracy": "accuracy of nearest neighbours",
    "logreg_accuracy": "accuracy of a linear probe",
    "logreg_macro_f1": "macro F1 of a linear probe",
    "bio": "mean of the six",
}


def demonstrate(
    out: Path, *, device: str = "auto", pretrain_epochs: int = 24, finetune_epochs: int | None = None
) -> str:
    """Pretrain, embed, fine-tune and classify; write figures and data into ``out`` and return a table of scores.

    The same call resumes what an earlier one left in ``out``.
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    adata = datasets.pbmc68k()
    # a fifth of the cells is held out for testing, a tenth for validation
    pp.split(adata, fractions=_FRACTIONS, stratify=_KEY)
    n_train = int((adata.obs["split"] == "train").sum())
    with _one_thread(), details():
        _say(f"pretraining on {n_train} cells without labels")
        model = _pretrain(adata, out / "pretrain", pretrain_epochs, device)
        _say("embedding")
        tl.embed(adata, model, device=device)
        _say(f"fine-tuning on {n_train} cells with labels")
        tuned = _finetune(adata, model, out / "finetune", finetune_epochs, device)
        tl.classify(adata, tuned, device=device)
    _say("comparing with PCA and logistic regression")
    _add_simple_methods(adata)
    with details():
        embeddings = tl.benchmark(adata, key=_KEY)
    test = adata[adata.obs["split"] == "test"].copy()
    held_out = {
        name: metrics.classification_scores(test.obs[_KEY], test.obs[column])
        for name, column in {"X_scllm": "scllm_label", "X_pca": "logreg_label"}.items()
    }
    _say("plotting")
    _draw(adata, test, model, tuned, out)
    adata.write_h5ad(out / "embedding.h5ad")
    files = "loss_curves.png, umap.png, confusion_matrix.png and embedding.h5ad"
    seconds = time.perf_counter() - began
    return f"\n{_table(adata, embeddings, held_out)}\n\n{files} are in {out} ({seconds:.0f} s)."


@contextmanager
def _one_thread() -> Iterator[None]:
    # for matrices this small, two threads on two busy cores took six times as long
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(step: str) -> None:
    typer.echo(f"{step} ...", err=True)


def _pretrain(adata: AnnData, run_dir: Path, epochs: int, device: str) -> CellModel:
    # fewer epochs than the default, which takes minutes
    return tl.pretrain(
        adata,
        size="tiny",
        run_dir=run_dir,
        epochs=epochs,
        validation="split",
        device=device,
        n_gpus=1 if _uses_gpu(device) else None,
    )


def _finetune(adata: AnnData, model: CellModel, run_dir: Path, epochs: int | None, device: str) -> CellModel:
    return tl.finetune(
        adata,
        model,
        key=_KEY,
        run_dir=run_dir,
        epochs=epochs,
        validation="split",
        device=device,
        n_gpus=1 if _uses_gpu(device) else None,
    )


def _uses_gpu(device: str) -> bool:
    return torch.cuda.is_available() if device == "auto" else device == "cuda"


def _add_simple_methods(adata: AnnData) -> None:
    """Write ``obsm["X_pca"]`` of all cells, and ``obs["logreg_label"]``, fitted to training and validation cells."""
    import scanpy as sc

    logged = AnnData(adata.X.copy())
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    sc.pp.pca(logged, n_comps=50, random_state=0)
    adata.obsm["X_pca"] = logged.obsm["X_pca"]
    is_test = (adata.obs["split"] == "test").to_numpy()
    probe = LogisticRegression(max_iter=2000)
    probe.fit(logged.X[~is_test], adata.obs[_KEY][~is_test])
    adata.obs["logreg_label"] = pd.Categorical(probe.predict(logged.X), categories=adata.obs[_KEY].cat.categories)


def _draw(adata: AnnData, test: AnnData, model: CellModel, tuned: CellModel, out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    pl.loss_curves(model, metrics=["mse_share"], ax=axes[:1], show=False)
    # the loss of the first steps is so high that it would flatten the rest of the curve
    axes[0].set(ylim=(0.5, 1.2), ylabel="pretraining: unexplained variance (fraction)")
    pl.loss_curves(tuned, metrics=["loss", "accuracy"], ax=axes[1:], show=False)
    axes[1].set(ylabel="fine-tuning: cross-entropy")
    axes[2].set(ylabel="fine-tuning: accuracy", ylim=(0, 1.02))
    _save(figure, out / "loss_curves.png")
    _save(_umaps(adata), out / "umap.png")
    ax = pl.confusion_matrix(test, truth=_KEY, predicted="scllm_label", show=False)
    _save(ax.figure, out / "confusion_matrix.png")


def _umaps(adata: AnnData) -> plt.Figure:
    """Plot UMAPs of both embeddings side by side, with one legend."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    sizes = adata.obs[_KEY].value_counts()
    colors = dict(zip(sizes.index, plt.get_cmap("tab10").colors, strict=False))
    for ax, (name, title) in zip(axes, _TITLES.items(), strict=True):
        adata.obsm[f"X_umap_{name.removeprefix('X_')}"] = coordinates = _umap(adata.obsm[name])
        _scatter(ax, coordinates, adata.obs[_KEY].to_numpy(), colors)
        ax.set_title(title, fontsize="medium")
    handles, names = axes[0].get_legend_handles_labels()
    names = [f"{name} ({sizes[name]})" for name in names]
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize="small", markerscale=2.5)
    return figure


def _umap(values: FloatArray) -> FloatArray:
    import scanpy as sc

    cells = AnnData(obsm={"values": values})
    sc.pp.neighbors(cells, use_rep="values", random_state=0)
    sc.tl.umap(cells, random_state=0)
    return cells.obsm["X_umap"]


def _scatter(ax: Axes, coordinates: FloatArray, labels: np.ndarray, colors: Mapping[str, tuple[float, ...]]) -> None:
    for name, color in colors.items():  # large classes first, so that small ones are on top
        x, y = coordinates[labels == name].T
        ax.scatter(x, y, s=9, color=color, linewidths=0, label=name)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    ax.spines[["top", "right"]].set_visible(False)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _table(adata: AnnData, embeddings: pd.DataFrame, held_out: Mapping[str, Mapping[str, float]]) -> str:
    """Format a table with one measure per line, for the transformer and the simple method."""
    n_test = int((adata.obs["split"] == "test").sum())
    line = "{:<34}{:>14}{:>22}".format
    score = "{:.3f}".format
    lines = [line("", "scllm", "simple method"), line(f"embedding of {adata.n_obs} cells", "X_scllm", "PCA")]
    lines += [
        line(f"  {title}", *(score(embeddings.loc[name, measure]) for name in _TITLES))
        for measure, title in _MEASURES.items()
    ]
    lines.append(line(f"labels of {n_test} held-out cells", "fine-tuned", "logistic regression"))
    lines += [
        line(f"  {title}", *(score(held_out[name][measure]) for name in _TITLES))
        for measure, title in {"accuracy": "accuracy", "macro_f1": "macro F1"}.items()
    ]
    return "\n".join(lines)
