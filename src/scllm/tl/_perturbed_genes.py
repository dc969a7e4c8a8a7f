"""The genes that are perturbed in silico: names and combinations, and null genes matched by expression."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd
from scipy import sparse

from scllm._log import warn
from scllm._names import listed
from scllm._typing import FloatArray, IntArray
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.models.base import CellModel

__all__ = ["ALL", "JOIN", "GeneLevels", "combinations", "gene_levels", "matched_combinations", "n_expressing"]

ALL = "all"
"""Value of ``genes=`` for every gene that a cell expresses."""
JOIN = "+"
"""Between the names of genes that are perturbed together."""

_ROWS = 4096


@dataclass(frozen=True)
class GeneLevels:
    """Expression of the measured genes in some cells.

    Parameters
    ----------
    names
        Name in the data of each gene.
    tokens
        Token of each gene, ``(m,)`` ascending.
    n_cells
        Number of cells that express it.
    mean
        Mean of its share of a cell's counts, as ``log1p`` of counts per 10,000.
    """

    names: list[str]
    tokens: IntArray
    n_cells: IntArray
    mean: FloatArray

    def level(self, tokens: Sequence[int]) -> float:
        """Return the mean expression of genes that are perturbed together."""
        at = np.searchsorted(self.tokens, tokens)
        known = (at < len(self.tokens)) & (self.tokens[at.clip(max=len(self.tokens) - 1)] == tokens)
        return float(np.where(known, self.mean[at.clip(max=len(self.tokens) - 1)], 0.0).mean())


def gene_levels(source: CellSource, match: GeneMatch, rows: IntArray) -> GeneLevels:
    """Measure how high genes are expressed, reading some thousand cells at a time."""
    n = int(match.token_ids.max(initial=-1)) + 1
    total, n_cells = np.zeros(n), np.zeros(n, np.int64)
    for first in range(0, len(rows), _ROWS):
        block = rows[first : first + _ROWS]
        tokens = match.tokens(source.read(block), block)
        values = np.asarray(tokens.values, np.float64)
        cell = np.repeat(np.arange(len(tokens)), tokens.lengths)
        sums = np.bincount(cell, weights=values, minlength=len(tokens))
        total += np.bincount(tokens.genes, weights=values / sums[cell], minlength=n)
        n_cells += np.bincount(tokens.genes, minlength=n)
    names = {}
    for name, token in zip(source.genes, match.token_ids, strict=True):
        names.setdefault(int(token), str(name))
    measured = match.measured
    mean = np.log1p(1e4 * total[measured] / max(len(rows), 1))
    return GeneLevels([names[int(token)] for token in measured], measured, n_cells[measured], mean)


def n_expressing(
    combined: Collection[tuple[int, ...]], source: CellSource, match: GeneMatch, rows: IntArray
) -> IntArray:
    """Count the cells that express all genes of each combination, reading some thousand cells at a time."""
    n = max((token for tokens in combined for token in tokens), default=-1) + 1
    found = np.zeros(len(combined), np.int64)
    for first in range(0, len(rows), _ROWS):
        block = rows[first : first + _ROWS]
        tokens = match.tokens(source.read(block), block)
        shape = (len(tokens), max(n, int(tokens.genes.max(initial=-1)) + 1))
        expressed = sparse.csr_matrix((np.ones(len(tokens.genes), bool), tokens.genes, tokens.indptr), shape).tocsc()
        for number, genes in enumerate(combined):
            cells = [expressed.indices[expressed.indptr[gene] : expressed.indptr[gene + 1]] for gene in genes]
            found[number] += len(cells[0]) if len(cells) == 1 else len(reduce(np.intersect1d, cells))
    return found


def combinations(
    genes: str | Sequence[str | Sequence[str]],
    source: CellSource,
    match: GeneMatch,
    model: CellModel,
    levels: GeneLevels,
    *,
    insert: bool,
) -> dict[str, tuple[int, ...]]:
    """Return the tokens of the genes that are perturbed together, by their joined names.

    ``genes`` is ``"all"``, or a list whose items are names or, for genes perturbed together, lists of names. With
    ``insert``, genes of the vocabulary that the data do not hold are known too. Unknown names are listed in a warning;
    if no name is left, that is an error.
    """
    if isinstance(genes, str) and genes == ALL:
        expressed = levels.n_cells > 0
        return {name: (int(token),) for name, token, is_in in zip(levels.names, levels.tokens, expressed) if is_in}
    items = [genes] if isinstance(genes, str) else list(genes)
    asked = [(item,) if isinstance(item, str) else tuple(item) for item in items]
    if not asked or not all(item and all(isinstance(name, str) for name in item) for item in asked):
        raise ValueError(
            f"Expected genes to be 'all', or names of genes and lists of names, got {genes!r:.80}. Pass for example "
            "['STAT1', ('IRF7', 'IRF9')]."
        )
    names = list(dict.fromkeys(name for item in asked for name in item))
    found = match.of_genes(source.genes, pd.Index(names))
    in_vocab = model.vocab.ids(names)
    # data may be named by symbols and the vocabulary by Ensembl ids: either name is known
    usable = insert | np.isin(in_vocab, match.measured)
    known = dict(zip(names, np.where((found < 0) & usable, in_vocab, found).tolist(), strict=True))
    special = set(model.vocab.special_ids.tolist())
    unknown = [name for name in names if known[name] < 0 or known[name] in special]
    kept = {JOIN.join(item): tuple(known[name] for name in item) for item in asked if not set(item) & set(unknown)}
    if not kept:
        where = "the model's vocabulary" if insert else "the data and the model's vocabulary"
        raise KeyError(
            f"Expected genes that are in {where}, but none of {len(asked)} is (first: {unknown[0]!r}). Pass names as "
            "they are in adata.var_names."
        )
    if unknown:
        warn(
            f"{len(unknown)} of {len(names)} names are no genes of the data that the model knows, and are left out: "
            f"{listed(unknown)}. Correct their spelling if they are measured."
        )
    twice = next((name for name, tokens in kept.items() if len(set(tokens)) < len(tokens)), None)
    if twice is not None:
        raise ValueError(f"Expected different genes in a combination, got {twice!r}. Name each gene once.")
    return kept


def matched_combinations(
    asked: dict[str, tuple[int, ...]], levels: GeneLevels, n_null: int, min_cells: int
) -> dict[str, tuple[int, ...]]:
    """Return null perturbations: for each one asked, others of as many genes with the nearest expression."""
    used = {token for tokens in asked.values() for token in tokens}
    usable = np.array([token not in used for token in levels.tokens]) & (levels.n_cells >= min_cells)
    pool = np.flatnonzero(usable)
    pool = pool[np.argsort(levels.mean[pool], kind="stable")]
    if not len(pool) or not n_null:
        return {}
    each = min(len(pool), max(20, -(-n_null // len(asked))))
    found: dict[str, tuple[int, ...]] = {}
    for tokens in asked.values():
        near = []
        for token in tokens:
            at = np.searchsorted(levels.tokens, token)
            level = levels.level([token]) if at < len(levels.tokens) else 0.0
            near.append(pool[np.argsort(np.abs(levels.mean[pool] - level), kind="stable")[:each]])
        for j in range(each):
            # the genes of a combination are taken from different places, so that they differ
            parts = list(dict.fromkeys(int(one[(j + shift) % each]) for shift, one in enumerate(near)))
            if len(parts) == len(tokens):
                name = JOIN.join(levels.names[i] for i in parts)
                found.setdefault(name, tuple(int(levels.tokens[i]) for i in parts))
    return found
