"""Infer a network of genes from a model."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from scllm import _keys, metrics
from scllm._checks import check_adata, groups, missing_key
from scllm._log import log, warn
from scllm._names import listed
from scllm._results import free_key, record, record_keys
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.opened import closes_files
from scllm.data.source import open_source
from scllm.engine.config import Precision
from scllm.tl._gene_links import Reader
from scllm.tl._inputs import check_layer
from scllm.tl._model import ModelLike, gene_match, remember, resolve
from scllm.tl._network_baselines import expression_networks
from scllm.tl._perturbed_cells import log_normalised
from scllm.tl._perturbed_genes import GeneLevels, gene_levels

__all__ = ["infer_grn"]

Method = Literal["attention", "similarity", "perturb"]
_METHODS = ("attention", "similarity", "perturb")


@closes_files
def infer_grn(
    adata: AnnData,
    model: ModelLike | None = None,
    *,
    method: Method = "attention",
    groupby: str | None = None,
    control: str | None = None,
    n_edges: int = 20,
    reference: pd.DataFrame | Sequence[tuple[str, str]] | None = None,
    genes: Sequence[str] | None = None,
    fdr: float = 0.05,
    block: int = -1,
    select_heads: bool = False,
    resolution: float = 1.0,
    max_cells: int | None = None,
    layer: str | None = None,
    gene_key: str | None = None,
    min_coverage: float | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    random_state: int = 0,
    key_added: str = _keys.GRN,
    copy: bool = False,
) -> AnnData | None:
    """Infer a network of genes from the attention, the gene embeddings or the predictions of a model.

    Such a network describes the model. Models learn from co-expression, and co-expression alone cannot tell which of
    two genes acts on the other: test edges against perturbation data, and compare them with the correlation of
    expression, which ``reference`` does.

    Parameters
    ----------
    adata
        Cells by genes.
    model
        A model or its path. ``None``: the model last recorded on ``adata``.
    method
        How genes are linked:

        - ``"attention"``: the mean rank of the attention that the target pays to the source in one block, among all
          genes of a cell (Cui et al. 2024). Directed, without a sign. For scgpt, geneformer and scfoundation.
        - ``"similarity"``: cosine similarity of gene embeddings, with groups of genes (programmes) by the Leiden
          algorithm. Not directed; negative for opposite embeddings, which count as links too. With ``groupby``, of mean
          hidden states in each group of cells.
        - ``"perturb"``: the change of the predicted target after deletion of the source, compared with deletions of
          genes of similar expression (:func:`scllm.metrics.directed_edges`). Directed and signed, with a false
          discovery rate.
    groupby
        Column of ``obs`` with groups of cells; a network is inferred for each group.
    control
        Group that all others are contrasted with: links are those of the group minus those of the control.
    n_edges
        The strongest edges that are kept for each source.
    reference
        Known edges to score the network against: pairs of source and target, or a DataFrame whose first columns are
        these. All pairs of a source of the reference with any gene are scored.
    genes
        Genes of the network. ``None``: all that at least 1 % of the cells express.
    fdr
        False discovery rate of edges (``"perturb"``).
    block
        Transformer block whose attention is read; -1 is the last.
    select_heads
        Choose the attention head with the highest AUROC on one half of the sources in ``reference``; all scores are
        then computed on the other half only. Otherwise the mean over heads is used.
    resolution
        Resolution of the Leiden algorithm; higher values give smaller programmes.
    max_cells
        Read a random subset of so many cells of each group. ``None``: all cells.
    layer
        Layer to read. ``None``: ``X``.
    gene_key
        Column of ``var`` with gene names, or ``"var_names"``. ``None``: as in :func:`embed`.
    min_coverage
        Minimum fraction of genes that must be in the model's vocabulary. ``None``: as in :func:`embed`.
    device
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    precision
        ``"auto"``: fp32 on a CPU, bf16 on a GPU that supports it.
    random_state
        Seed of the subset of cells, halves of the reference, and the Leiden algorithm.
    key_added
        Key in ``varp``; several groups append ``_<group>``.
    copy
        Return a changed copy instead of changing ``adata``.

    Writes
    ------
    ``adata.varp[key_added]``
        Weights of the strongest edges, CSR ``(n_genes, n_genes)``: rows are sources, columns targets.
    ``adata.var[key_added + "_programme"]``
        Programme of each gene (``"similarity"``); several groups add ``_<group>`` to the key.
    ``adata.uns["scllm"][key_added]``
        ``params``; ``table`` of these edges: ``group``, ``source``, ``target``, ``weight``, and for ``"perturb"`` also
        ``effect``, ``z``, ``p_value``, ``q_value``, ``reverse_z`` and ``sign`` (1: the target falls more than after
        other deletions, so the source activates it; -1: it represses it). There, ``weight`` is minus ``z``. With
        ``reference``, ``scores`` of the network beside correlation, partial correlation and a random forest
        (:func:`scllm.metrics.edge_scores`). With several groups, ``dynamics``: for each gene, the share of its
        strongest edges that differ between two groups.

    Examples
    --------
    >>> adata = scllm.datasets.toy(n_cells=30, n_genes=30)
    >>> model = scllm.models.build("scgpt", vocab=adata.var_names, size="tiny")
    >>> scllm.tl.infer_grn(adata, model, n_edges=3)
    >>> adata.varp["grn"].shape
    (30, 30)
    """
    check_adata(adata, copy, key_added)
    _check_options(method, n_edges, fdr, reference, select_heads)
    chosen = resolve(model, adata)
    _check_block(block, len(chosen.blocks))
    source = open_source(adata, layer=layer)
    check_layer(source, chosen, layer, adata)
    match = gene_match(adata, source, chosen, gene_key, min_coverage)
    cells = _groups(adata, groupby, control, max_cells, random_state)
    rows = np.unique(np.concatenate(list(cells.values())))
    levels = gene_levels(source, match, rows)
    network = _Network.of(levels, genes, len(rows), method)
    edges = None if reference is None else network.edges(reference, random_state, select_heads=select_heads)
    reader = Reader(chosen, source, match, network.tokens, device, precision)
    log.info("linking %d genes by %s in %d cells", len(network.names), method, len(rows))
    links = {name: _links(reader, method, of, block, groupby, select_heads) for name, of in cells.items()}
    head = None
    if select_heads:
        assert edges is not None
        links, head = _of_best_head(links, edges)
    if control is not None:
        links = {name: weight - links[control] for name, weight in links.items() if name != control}
    found = {name: network.strongest(weight, method, n_edges, fdr) for name, weight in links.items()}

    names = [key_added] if len(found) == 1 else [f"{key_added}_{name}" for name in found]
    keys = [free_key(adata, "varp", name) for name in names]
    results: dict[str, Any] = {}
    if edges is not None:
        x = log_normalised(source, match, rows)[:, np.searchsorted(match.measured, network.tokens)]
        strength = {name: one.strength for name, one in found.items()}
        results["scores"] = _scores(strength, x, edges, method, select_heads, random_state)
    if len(found) > 1:
        results["dynamics"] = network.dynamics(found)
    adata = adata.copy() if copy else adata
    columns = match.of_genes(source.genes, adata.var_names)
    for old in record_keys(adata, "varp", names, call=key_added):
        adata.varp.pop(old, None)
    for key, one in zip(keys, found.values(), strict=True):
        adata.varp[key] = network.placed(one.kept, columns, adata.n_vars)
    if method == "similarity":
        for name, one in zip(names, found.values(), strict=True):
            programme = _programmes(one.kept, resolution, random_state)
            adata.var[_keys.safe(name) + _keys.PROGRAMME] = network.column(programme, columns)
    table = pd.concat([one.table.assign(group=name) for name, one in found.items()], ignore_index=True)
    params = {"method": method, "groupby": groupby, "control": control, "n_edges": n_edges, "n_cells": len(rows)}
    params |= {"block": block, "head": head, "fdr": fdr, "layer": layer, "random_state": random_state}
    record(adata, _keys.safe(key_added), params, table, **results)
    remember(adata, chosen)
    return adata if copy else None


def _check_options(method: str, n_edges: int, fdr: float, reference: object, select_heads: bool) -> None:
    """Raise on options that are unknown or exclude each other."""
    if method not in _METHODS:
        raise ValueError(f"Expected method to be one of {_METHODS}, got {method!r}. Pass one of these.")
    if n_edges < 1:
        raise ValueError(f"Expected n_edges of at least 1, got {n_edges}. Pass 20.")
    if not 0 < fdr < 1:
        raise ValueError(f"Expected fdr between 0 and 1, got {fdr}. Pass 0.05.")
    if select_heads and (method != "attention" or reference is None):
        raise TypeError(
            f"select_heads=True chooses attention heads by reference edges, but method={method!r} and reference is "
            f"{'None' if reference is None else 'given'}. Pass method='attention' and reference=."
        )


def _check_block(block: int, n_blocks: int) -> None:
    """Raise if the model has no such block."""
    if not -n_blocks <= block < n_blocks:
        raise ValueError(f"Expected block from {-n_blocks} to {n_blocks - 1}, got {block}. Pass -1 for the last block.")


def _groups(
    adata: AnnData, groupby: str | None, control: str | None, max_cells: int | None, seed: int
) -> dict[str, IntArray]:
    """Return the cells of each group."""
    if groupby is None:
        if control is not None:
            raise TypeError(f"control={control!r} names a group, but groupby is None. Pass the column that holds it.")
        cells = {"all": np.arange(adata.n_obs)}
        if not adata.n_obs:
            raise ValueError("Expected at least one cell in adata, got 0 cells. Check earlier filters.")
    else:
        column = groups(adata.obs, groupby)
        names, codes = list(column.cat.categories), column.cat.codes.to_numpy()
        if control is not None and control not in names:
            raise missing_key(control, names, f"a group in adata.obs[{groupby!r}]")
        if control is not None and len(names) < 2:
            raise ValueError(
                f"Expected another group than control={control!r} in obs[{groupby!r}], got none. Leave control out."
            )
        cells = {name: np.flatnonzero(codes == i) for i, name in enumerate(names)}
    if max_cells is not None:
        if max_cells < 1:
            raise ValueError(f"Expected max_cells of at least 1, got {max_cells}. Leave it out for all cells.")
        rng = np.random.default_rng(seed)
        cells = {k: np.sort(rng.choice(v, min(len(v), max_cells), replace=False)) for k, v in cells.items()}
    return cells


@dataclass(frozen=True)
class _Edges:
    """Reference edges between genes of the network, ``(m, m)``; heads are chosen on the sources ``chosen_on``."""

    is_edge: NDArray[np.bool_]
    sources: IntArray
    chosen_on: IntArray

    def among(self, sources: IntArray) -> NDArray[np.bool_]:
        """Return all pairs of these sources with other genes."""
        pairs = np.zeros(self.is_edge.shape, bool)
        pairs[sources] = True
        np.fill_diagonal(pairs, False)
        return pairs


@dataclass(frozen=True)
class _Found:
    """The strength of all links, ``(m, m)``, the weights of the edges that are kept, and their table."""

    strength: FloatArray
    kept: CSR
    table: pd.DataFrame


@dataclass(frozen=True)
class _Network:
    """The genes of a network."""

    names: list[str]
    tokens: IntArray
    level: FloatArray

    @classmethod
    def of(cls, levels: GeneLevels, genes: Sequence[str] | None, n_cells: int, method: Method) -> _Network:
        """Choose the genes: those named, or those that enough cells express."""
        kept = np.flatnonzero(levels.n_cells >= max(1, n_cells // 100))
        if genes is not None:
            genes = [genes] if isinstance(genes, str) else list(genes)
            if not genes:
                raise ValueError("Expected names of genes, got an empty list. Leave genes out for all expressed genes.")
            known = {name: i for i, name in enumerate(levels.names) if levels.n_cells[i]}
            lost = [name for name in genes if name not in known]
            if len(lost) == len(set(genes)):
                raise KeyError(
                    f"Expected genes that the cells express and the model knows, but none of {len(lost)} is (first: "
                    f"{lost[0] if lost else None!r}). Pass names as they are in adata.var_names."
                )
            if lost:
                warn(f"{len(lost)} genes are not expressed or not known to the model, and left out: {listed(lost)}.")
            kept = np.sort([known[name] for name in set(genes) - set(lost)])
        n_needed = metrics.FEWEST_NULLS + 2 if method == "perturb" else 2
        if len(kept) < n_needed:
            raise ValueError(
                f"Expected at least {n_needed} genes in a network with method={method!r}, got {len(kept)}. Pass more "
                "genes or cells."
            )
        return cls([levels.names[i] for i in kept], levels.tokens[kept], levels.mean[kept])

    def edges(self, reference: pd.DataFrame | Sequence[tuple[str, str]], seed: int, *, select_heads: bool) -> _Edges:
        """Find the reference edges between genes of the network."""
        if isinstance(reference, str) or not len(reference):
            raise ValueError(
                f"Expected reference to hold pairs of genes, got {reference!r:.60}. Pass a DataFrame with two columns, "
                "or a list of pairs."
            )
        pairs = reference.iloc[:, :2].to_numpy() if isinstance(reference, pd.DataFrame) else np.array(list(reference))
        if pairs.ndim != 2 or pairs.shape[1] != 2:
            raise ValueError(f"Expected reference to hold pairs of genes, got shape {pairs.shape}. Pass two columns.")
        place = {name: i for i, name in enumerate(self.names)}
        known = [(place[a], place[b]) for a, b in pairs if a in place and b in place and a != b]
        if not known:
            raise ValueError(
                f"Expected reference edges between the {len(self.names)} genes of the network, got none among "
                f"{len(pairs)} (first: {' -> '.join(map(str, pairs[0])) if len(pairs) else 'none'}). Pass names as "
                "they are in adata.var_names."
            )
        lost = sorted({str(name) for name in pairs.ravel() if name not in place})
        if lost:
            warn(
                f"{len(pairs) - len(known)} of {len(pairs)} reference edges are not scored: {listed(lost)} are no "
                "genes of the network. Correct their spelling if they are measured."
            )
        is_edge = np.zeros((len(self.names),) * 2, bool)
        is_edge[tuple(np.array(known).T)] = True
        sources = np.flatnonzero(np.isin(self.names, pairs[:, 0].astype(str)))
        half = np.random.default_rng(seed).permutation(sources)[: len(sources) // 2]
        if select_heads and not is_edge[half].any():
            raise ValueError(
                f"Expected reference edges of at least 2 sources in the network to choose heads on one half of them, "
                f"got {len(sources)} sources. Leave select_heads out."
            )
        return _Edges(is_edge, sources, np.sort(half))

    def strongest(self, weight: FloatArray, method: Method, n_edges: int, fdr: float) -> _Found:
        """Keep the strongest edges of each source; those from deletions must be significant."""
        strength = np.abs(np.nan_to_num(weight))
        if method == "perturb":
            found = metrics.directed_edges(weight, self.level, fdr=fdr)
            strength = np.zeros_like(weight)
            strength[found["source"], found["target"]] = np.abs(found["z"])
            found = found[found["is_edge"]].drop(columns="is_edge")
            if not len(found):
                warn(f"No edge is significant at a false discovery rate of {fdr}: the network is empty.")
            found["weight"] = found["sign"] * found["z"].abs()
        else:
            source, target = np.nonzero(strength)
            found = pd.DataFrame({"source": source, "target": target, "weight": weight[source, target]})
        found = found.iloc[np.argsort(-found["weight"].abs().to_numpy(), kind="stable")]
        found = found.groupby("source", sort=False).head(n_edges).sort_values(["source", "target"])
        shape = strength.shape
        kept = sparse.csr_matrix((found["weight"].to_numpy(np.float32), (found["source"], found["target"])), shape)
        names = np.array(self.names, dtype=object)
        table = found.assign(source=names[found["source"]], target=names[found["target"]])
        return _Found(strength, kept, table.reset_index(drop=True))

    def dynamics(self, found: Mapping[str, _Found]) -> pd.DataFrame:
        """Compare the edges of each gene between groups."""
        parts = []
        for (one, first), (other, second) in itertools.combinations(found.items(), 2):
            a, b = first.kept.astype(bool), second.kept.astype(bool)
            shared = np.asarray(a.multiply(b).sum(1)).ravel()
            united = np.asarray((a + b).sum(1)).ravel()
            change = 1 - np.divide(shared, united, out=np.full(len(shared), np.nan), where=united > 0)
            columns = {"gene": self.names, "group": one, "other_group": other, "n_shared": shared, "change": change}
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def placed(self, kept: CSR, columns: IntArray, n_vars: int) -> CSR:
        """Move edges to the genes of the AnnData; genes that share a token have the same edges."""
        place = self._place(columns)
        known = np.flatnonzero(place >= 0)
        spread = sparse.csr_matrix((np.ones(len(known), np.float32), (known, place[known])), (n_vars, len(self.names)))
        return (spread @ kept @ spread.T).tocsr().astype(np.float32)

    def column(self, programme: IntArray, columns: IntArray) -> pd.Categorical:
        """Return the programme of each gene of the AnnData; missing for genes that are not in the network."""
        place = self._place(columns)
        labels = [str(programme[i]) if i >= 0 else None for i in place]
        return pd.Categorical(labels, categories=[str(i) for i in range(int(programme.max()) + 1)])

    def _place(self, columns: IntArray) -> IntArray:
        at = np.searchsorted(self.tokens, columns).clip(max=len(self.tokens) - 1)
        return np.where(self.tokens[at] == columns, at, -1)


def _links(
    reader: Reader, method: Method, rows: IntArray, block: int, groupby: str | None, by_head: bool
) -> FloatArray:
    """Link genes in some cells."""
    if method == "attention":
        return reader.attention(rows, block, by_head=by_head)
    if method == "similarity":
        return reader.similarity(None if groupby is None else rows)
    return reader.deletions(rows)


def _of_best_head(links: Mapping[str, FloatArray], edges: _Edges) -> tuple[dict[str, FloatArray], int]:
    """Choose the head with the highest mean AUROC on one half of the sources."""
    among = edges.among(edges.chosen_on)
    n_heads = len(next(iter(links.values())))
    scores = [
        np.nanmean([metrics.edge_scores(of[head], edges.is_edge, among)["auroc"] for of in links.values()])
        for head in range(n_heads)
    ]
    if not np.isfinite(scores).any():
        raise ValueError(
            "Expected reference edges of at least 2 sources to choose heads on one half of them, got too few. Leave "
            "select_heads out."
        )
    head = int(np.nanargmax(scores))
    return {name: of[head] for name, of in links.items()}, head


def _scores(
    strength: Mapping[str, FloatArray], x: CSR, edges: _Edges, method: str, select_heads: bool, seed: int
) -> pd.DataFrame:
    """Score networks and those from expression alone on the same pairs."""
    sources = np.setdiff1d(edges.sources, edges.chosen_on) if select_heads else edges.sources
    among = edges.among(sources)
    rows = [
        {"method": method, "group": name, **metrics.edge_scores(of, edges.is_edge, among)}
        for name, of in strength.items()
    ]
    for name, weight in expression_networks(x, edges.sources, seed).items():
        rows.append({"method": name, "group": "all", **metrics.edge_scores(weight, edges.is_edge, among)})
    return pd.DataFrame(rows).assign(n_pairs=int(among.sum()), n_edges=int(edges.is_edge[among].sum()))


def _programmes(kept: CSR, resolution: float, seed: int) -> IntArray:
    """Group genes by the Leiden algorithm on their strongest positive links; the largest programme is 0."""
    import igraph

    links = kept.maximum(kept.T).tocoo()
    upper = (links.row < links.col) & (links.data > 0)
    pairs = np.column_stack([links.row, links.col])[upper]
    graph = igraph.Graph(n=kept.shape[0], edges=pairs)
    try:
        igraph.set_random_number_generator(random.Random(seed))
        found = np.array(
            graph.community_leiden(
                objective_function="modularity", weights=links.data[upper].tolist(), resolution=resolution,
                n_iterations=-1,
            ).membership
        )  # fmt: skip
    finally:
        igraph.set_random_number_generator(random)
    order = np.argsort(-np.bincount(found), kind="stable")
    return np.argsort(order)[found]
