"""Score predicted expression of spots, gene by gene within each section."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scllm import _keys, metrics
from scllm._checks import check_adata, groups
from scllm._log import log
from scllm._names import listed
from scllm._results import record
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.data.spots import each_section, sections_of, spot_graph, spot_positions
from scllm.data.targets import dense, normalised
from scllm.data.value_kind import value_kind
from scllm.models.gene_lm import GeneLM
from scllm.models.plausibility import Plausibility
from scllm.tl._model import ModelLike, resolve
from scllm.tl._spatial_inputs import expression_source

__all__ = ["PER_GENE", "LikelihoodScores", "evaluate_spatial", "section_scores", "summary"]

PER_GENE = ("pcc", "spearman", "mse", "ssim", "morans_i_error", "variance_ratio")
_TOP = 50


@closes_files
def evaluate_spatial(
    adata: AnnData,
    *,
    predicted: str,
    truth: str | None = None,
    group_key: str | None = None,
    genes: Sequence[str] | None = None,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
    lm: ModelLike | None = None,
) -> pd.DataFrame:
    """Score predicted expression of spots within each section.

    Every score is computed within a section and then averaged over sections. On sections joined together, differences
    between their means would count as agreement. Genes that do not vary in a section are left out there and counted.
    Genes that vary but are predicted as constant have correlation 0; they have no gene-gene correlations and no Moran's
    I, so these scores leave them out, and they are counted too.

    Parameters
    ----------
    adata
        Spots by genes, with ``obsm["spatial"]``.
    predicted
        Layer with predictions (NaN for genes that were not predicted).
    truth
        Layer with measured expression. ``None``: ``X``. Counts are normalised to 10,000 per spot over all genes of
        ``adata`` and log-transformed, as in :func:`fit_spatial`; other values are compared as they are.
    group_key
        Column of ``obs`` with the sections. ``None``: the column whose values are the keys of ``uns["spatial"]``, or
        one section if it has at most one key.
    genes
        Genes to score. ``None``: all that were predicted.
    gene_sets
        Names of pathways and their genes. Adds ``pathway_pcc``: the correlation of the mean of each set, for sets with
        at least two genes that were predicted.
    lm
        A gene language model or its path. It must not have been trained on these spots, because it would find the
        measured ones more plausible than new ones. Adds ``nats_truth`` and ``nats_predicted``, the negative
        log-likelihood per gene of measured and of predicted spots (for scgpt the squared error of hidden genes), and
        ``auroc_real``, how well it tells measured spots from predicted ones (0.5: not at all). Of a predicted spot, as
        many of the highest genes are read as the measured spot expresses.

    Returns
    -------
    One row per section and their ``mean``, with these columns:

    - ``pcc``, ``spearman``, ``mse``, ``ssim``: means over genes; ``pcc_top50_variable`` and ``pcc_top50_predicted``
      over the 50 genes with the highest variance and with the highest ``pcc``;
    - ``morans_i_error``: mean absolute difference of Moran's I (NaN if all predictions are constant);
    - ``variance_ratio``: median over genes of predicted divided by true variance;
    - ``correlation_error``: root mean square error of gene-gene correlations (NaN with fewer than two genes that vary
      in truth and prediction);
    - ``n_spots``, ``n_genes``, ``n_constant``, the number of genes left out, and ``n_constant_predicted``, the number
      of others that are predicted as constant.

    Writes
    ------
    ``adata.uns["scllm"]["spatial"]``
        ``params``, and a ``table`` of each gene's scores in each section.

    Examples
    --------
    >>> adata = scllm.datasets.toy_spatial(n_sections=2, side=8)
    >>> model = scllm.tl.fit_spatial(adata, use_rep="programmes", epochs=5)
    >>> scllm.tl.predict_spatial(adata, model)
    >>> scllm.tl.evaluate_spatial(adata, predicted="predicted").index.tolist()
    ['section1', 'section2', 'mean']
    """
    check_adata(adata)
    source = expression_source(adata, truth)
    # predictions may be negative, so only that they are there is checked
    found = open_source(adata, layer=predicted)
    if group_key is None:
        section = sections_of(adata.obs, adata.uns.get(_keys.SPATIAL, {}))
    else:
        groups(adata.obs, group_key)
        section = sections_of(adata.obs, (), group_key)
    columns = _columns(adata, predicted, genes)
    xy = spot_positions(adata.obsm, adata.obs_names)
    sets = _sets(adata, columns, gene_sets)
    scorer = None if lm is None else LikelihoodScores(resolve(lm, adata), adata.var_names[columns])
    is_counts = value_kind(source.read(np.arange(min(source.n_obs, 4096)))) == "counts"
    rows, tables = {}, []
    for name, spots in each_section(section):
        true = dense(normalised(source, spots, is_counts=is_counts), columns)
        guess = _rows(adata, predicted, spots, columns, found)
        graph = spot_graph(xy[spots], pd.Series("", index=range(len(spots))))
        table = section_scores(true, guess, graph)
        table.insert(0, "gene", adata.var_names[columns])
        table.insert(0, "section", name)
        tables.append(table)
        rows[name] = summary(true, guess, table, sets) | ({} if scorer is None else scorer(true, guess))
    scores = pd.DataFrame.from_dict(rows, orient="index")
    scores.loc["mean"] = scores.mean()
    n_constant = int(scores["n_constant"].iloc[:-1].sum())
    if n_constant:
        log.info("leaving out %d genes without variation in a section, over %d sections", n_constant, len(rows))
    params = {"predicted": predicted, "truth": truth, "group_key": group_key}
    record(adata, "spatial", params, pd.concat(tables, ignore_index=True), scores=scores)
    return scores


def section_scores(truth: FloatArray, predicted: FloatArray, graph: CSR | None) -> pd.DataFrame:
    """Score each gene in one section; NaN for genes that do not vary. Without a graph, Moran's I is left out."""
    constant = metrics.is_constant(truth)
    table = {
        "pcc": metrics.pearson(truth, predicted),
        "spearman": metrics.spearman(truth, predicted),
        "mse": np.where(constant, np.nan, ((truth - predicted) ** 2).mean(0)),
        "ssim": metrics.structural_similarity(truth, predicted),
        "variance_ratio": metrics.variance_ratio(truth, predicted),
        "variance": truth.var(0),
    }
    if graph is not None and graph.nnz:
        # a constant prediction has no Moran's I; 0 would be nearer to that of noisy genes than any smooth prediction
        unknown = constant | metrics.is_constant(predicted)
        error = np.abs(morans_i(graph, predicted) - morans_i(graph, truth))
        table["morans_i_error"] = np.where(unknown, np.nan, error)
    return pd.DataFrame(table)


def morans_i(graph: CSR, values: CSR | FloatArray) -> FloatArray:
    """Compute Moran's I of each gene of ``values`` (spots by genes), ``(g,)``; NaN for genes that do not vary."""
    import scanpy as sc

    is_sparse = sparse.issparse(values)
    genes = sparse.csr_matrix(values.T, dtype=np.float64) if is_sparse else np.ascontiguousarray(values.T, np.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ variables were constant")
        return np.asarray(sc.metrics.morans_i(sparse.csr_matrix(graph, dtype=np.float64), genes))


def summary(
    truth: FloatArray, predicted: FloatArray, table: pd.DataFrame, sets: Mapping[str, IntArray]
) -> dict[str, float]:
    """Average the scores of genes that vary in a section, and add those of pairs and sets of genes."""
    varying = table[table["pcc"].notna()]
    row = {name: varying[name].mean() for name in PER_GENE if name in table and name != "variance_ratio"}
    row["pcc_top50_variable"] = varying.nlargest(_TOP, "variance")["pcc"].mean()
    row["pcc_top50_predicted"] = varying.nlargest(_TOP, "pcc")["pcc"].mean()
    row["variance_ratio"] = varying["variance_ratio"].median()
    row["correlation_error"] = metrics.correlation_error(truth, predicted)
    if sets:
        means = [np.stack([values[:, genes].mean(1) for genes in sets.values()], 1) for values in (truth, predicted)]
        row["pathway_pcc"] = float(np.nanmean(metrics.pearson(*means)))
    row |= {"n_spots": len(truth), "n_genes": len(varying), "n_constant": len(table) - len(varying)}
    row["n_constant_predicted"] = int((metrics.is_constant(predicted) & table["pcc"].notna().to_numpy()).sum())
    return row


def _columns(adata: AnnData, predicted: str, genes: Sequence[str] | None) -> IntArray:
    """Return the columns of genes that were predicted, or of those that were asked for."""
    layer = adata.layers[predicted]
    # a gene is predicted in all spots or in none
    there = np.ones(adata.n_vars, bool) if sparse.issparse(layer) else ~np.isnan(np.asarray(layer[0])).ravel()
    if genes is None:
        columns = np.flatnonzero(there)
    else:
        columns = adata.var_names.get_indexer(list(genes))
        lacking = [gene for gene, at in zip(genes, columns, strict=True) if at < 0 or not there[at]]
        if lacking:
            raise ValueError(
                f"Expected genes that were predicted, but layers[{predicted!r}] has none of {listed(lacking)}. Correct "
                "genes=."
            )
    if not len(columns):
        raise ValueError(f"Expected predictions in layers[{predicted!r}], got only NaN. Call tl.predict_spatial again.")
    return columns


def _rows(adata: AnnData, layer: str, spots: IntArray, columns: IntArray, found: Any) -> FloatArray:
    """Return predictions of the spots of a section, ``(n, g)``."""
    values = adata.layers[layer]
    if sparse.issparse(values):
        return dense(found.read(spots), columns)
    guess = np.asarray(values[spots][:, columns], np.float32)
    if not np.isfinite(guess).all():
        raise ValueError(
            f"Expected finite predictions in layers[{layer!r}], but some are not. Predict all spots, or pass the spots "
            "that were predicted."
        )
    return guess


def _sets(adata: AnnData, columns: IntArray, gene_sets: Mapping[str, Sequence[str]] | None) -> dict[str, IntArray]:
    """Return the places of each set's genes among the scored ones, for sets with at least two."""
    names = adata.var_names[columns]
    places = {name: names.get_indexer(list(genes)) for name, genes in (gene_sets or {}).items()}
    usable = {name: at[at >= 0] for name, at in places.items() if (at >= 0).sum() > 1}
    if gene_sets and not usable:
        raise ValueError(
            f"Expected gene sets with at least 2 predicted genes, but none of {len(gene_sets)} has (first: "
            f"{next(iter(gene_sets))!r}). Spell genes as in adata.var_names."
        )
    return usable


class LikelihoodScores:
    """Scores how plausible measured and predicted spots are under a language model."""

    def __init__(self, lm: Any, genes: pd.Index) -> None:
        kind = "nll" if isinstance(lm, GeneLM) else "masked"
        self._nats = Plausibility(lm, kind=kind, genes=list(genes)).eval()

    @torch.no_grad()
    def __call__(self, truth: FloatArray, predicted: FloatArray) -> dict[str, float]:
        parts = list(zip(_parts(truth), _parts(predicted), strict=True))
        real = np.concatenate([self._nats(true).numpy() for true, _ in parts])
        # as many genes of each predicted spot as the measured one expresses: the nats of others do not compare
        guess = np.concatenate([self._nats(guess, true).numpy() for true, guess in parts])
        from sklearn.metrics import roc_auc_score

        is_real = np.repeat([1, 0], [len(real), len(guess)])
        area = roc_auc_score(is_real, -np.concatenate([real, guess]))
        return {"nats_truth": float(real.mean()), "nats_predicted": float(guess.mean()), "auroc_real": float(area)}


def _parts(values: FloatArray) -> tuple[torch.Tensor, ...]:
    return torch.from_numpy(np.ascontiguousarray(values)).split(64)
