"""Loss of predictions that do not depend on the cell, with which the loss of a model is compared.

A model that has learnt nothing from the other genes of a cell can still know how high a gene is on average, or how
often it occurs. Only a lower loss than that shows that it reads the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import xlogy

from scllm._typing import FloatArray, IntArray
from scllm.engine.loader import Loader
from scllm.engine.objectives import (
    MaskedExpression,
    MaskedGene,
    MaskedLevel,
    MaskedValue,
    NextGene,
    Objective,
    PermutedGene,
)
from scllm.engine.relational import COLUMN, constant_loss
from scllm.models.base import CellModel

__all__ = ["mean_prediction"]

# cells of which means and frequencies are computed, and as many on which they are scored
_SOME = 1024


def mean_prediction(
    model: CellModel,
    objective: Objective,
    training: Loader,
    validation: Loader | None,
    relational_weight: float | None = None,
) -> dict[str, float]:
    """Compute the loss of predicting each gene by its mean or frequency, by column of the history.

    Means and frequencies are those in at most 1,024 training cells. They are scored on at most 1,024 validation cells,
    or on other training cells if there are none. Masks are not drawn: the result is the mean over all of them. The
    relational term, if there is one, is that of equal embeddings of all cells.

    Returns
    -------
    ``mean_prediction`` for the loss and, if it is a sum, ``mean_prediction_<term>`` for its terms; nothing for
    objectives with labels.
    """
    scored = training if validation is None else validation
    rows, others = _some(training.rows), _some(scored.rows)
    if validation is None:
        rows, others = rows[::2], rows[1::2] if len(rows) > 1 else rows
    # encoded as in validation
    seen = _Cells(replace(training, training=False, encoder=model.encoder), rows, model)
    asked = _Cells(replace(scored, training=False, encoder=model.encoder), others, model)
    match objective:
        case MaskedValue():
            terms = _value_terms(objective, model, seen, asked)
        case MaskedExpression():
            shares = objective.mask_ratio[0] - objective.zeros, objective.zeros
            terms = {"mse": _squared_error(*(cells.moments(lambda n, m: shares) for cells in (seen, asked)))}
        case MaskedLevel():
            terms = {"loss": _level_nats(seen.levels(model.config.n_levels), asked.levels(model.config.n_levels))}
        case NextGene() | MaskedGene() | PermutedGene():
            terms = {"loss": _gene_nats(seen.frequencies(), asked.frequencies(), len(model.vocab.genes))}
        case _:
            return {}
    weights = {name: getattr(objective, "from_cell", 1.0) if name.endswith("_cell") else 1.0 for name in terms}
    if training.reference is not None:
        if [*terms] == ["loss"]:
            terms = {"objective": terms.pop("loss")}
            weights = {"objective": 1.0}
        terms["relational"] = constant_loss(np.concatenate([*asked.references()]))
        weights["relational"] = relational_weight or 0.0
    loss = sum(weights[name] * value for name, value in terms.items())
    by_term = {f"mean_prediction_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
    return {name: float(f"{value:.6g}") for name, value in {"mean_prediction": loss, **by_term}.items()}


def _some(rows: IntArray) -> IntArray:
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(_SOME, len(rows))).astype(np.int64))]


@dataclass(frozen=True)
class _Moments:
    """Of the values that are asked for of each gene, ``(n_tokens,)`` each: weights, and weighted sums."""

    weight: FloatArray
    total: FloatArray
    squares: FloatArray
    expressed: FloatArray


@dataclass(frozen=True)
class _Cells:
    """Some cells as a model reads them."""

    loader: Loader
    rows: IntArray
    model: CellModel

    def moments(self, shares: Callable[[FloatArray, FloatArray], tuple[FloatArray | float, ...]]) -> _Moments:
        """Weight the values of each gene by how often they are asked for.

        ``shares`` maps the numbers of read and of measured genes of cells to two weights: of each gene that is read,
        and of each measured gene in addition, which is zero if it is not read.
        """
        n = len(self.model.vocab)
        sums = np.zeros((4, n))
        for rows, cell, genes, values in self._batches():
            by_file = self.loader.match.by_file(rows)
            measured = np.zeros(len(rows))
            for file, cells in by_file:
                measured[cells] = len(file.measured)
            of_read, of_any = shares(np.bincount(cell, minlength=len(rows)), measured)
            of_read, of_any = (np.broadcast_to(share, len(rows)) for share in (of_read, of_any))
            for file, cells in by_file:
                sums[0, file.measured] += of_any[cells].sum()
            weight = of_read + of_any
            parts = (of_read, weight, weight, weight)
            powers = (np.ones_like(values), values, values**2, values > 0)
            for total, part, power in zip(sums, parts, powers, strict=True):
                total += np.bincount(genes, part[cell] * power, minlength=n)
        return _Moments(*sums)

    def levels(self, n_levels: int) -> FloatArray:
        """Count the levels of each expressed gene, ``(n_tokens, n_levels)``."""
        counts = np.zeros((len(self.model.vocab), n_levels))
        for _, _, genes, values in self._batches():
            np.add.at(counts, (genes, values.astype(int)), values > 0)
        return counts

    def frequencies(self) -> FloatArray:
        """Count how often each gene occurs, ``(n_tokens,)``."""
        return self.moments(lambda n, m: (1.0, 0.0)).weight

    def references(self) -> Iterator[FloatArray]:
        """Yield the principal components of batches of cells, ``(b, k)``."""
        with closing(replace(self.loader, rows=self.rows, obs={}, weights=None, pinned=False).epoch(0)) as read:
            for batch in (part for parts in read for part in parts):
                assert batch.view is not None
                yield batch.view.obs[COLUMN].numpy()

    def _batches(self) -> Iterator[tuple[IntArray, IntArray, IntArray, FloatArray]]:
        """Yield rows, and the cell, the gene and the value of each token; a token without a value has a zero."""
        special = self.model.is_special.cpu().numpy()
        loader, start = replace(self.loader, rows=self.rows, obs={}, weights=None, pinned=False), 0
        with closing(loader.epoch(0)) as read:
            for batch in (part for parts in read for part in parts):
                batch = batch if batch.whole is None else batch.whole
                cell, genes = batch.cell.numpy(), batch.genes.numpy()
                values = np.zeros(len(genes)) if batch.values is None else batch.values.double().numpy()
                genuine = ~special[genes]
                yield self.rows[start : start + batch.n_cells], cell[genuine], genes[genuine], values[genuine]
                start += batch.n_cells


def _value_terms(objective: MaskedValue, model: CellModel, seen: _Cells, asked: _Cells) -> dict[str, float]:
    """Compute the terms of :class:`MaskedValue`; from the cell embedding, random measured genes may be asked too."""
    masked = [cells.moments(lambda n, m: (1.0, 0.0)) for cells in (seen, asked)]
    out, ratio = objective.left_out, np.array(objective.mask_ratio)
    # random genes weigh this share in a step with each ratio, and steps weigh as many values as they mask
    share = float((ratio * out / (ratio * (1 - out) + 2 * out)).sum() / ratio.sum()) if out else 0.0
    from_cell = masked
    if share:
        from_cell = [cells.moments(lambda n, m: (1 - share, share * n / np.maximum(m, 1))) for cells in (seen, asked)]
    found = {}
    for name in model.value_losses(objective.from_cell > 0):
        loss = _squared_error if name.startswith("mse") else _zero_nats
        found[name] = loss(*(from_cell if name.endswith("_cell") else masked))
    return found


def _squared_error(seen: _Moments, asked: _Moments) -> float:
    """Score the mean of each gene, to which one value with the mean of all genes is added."""
    mean = (seen.total + seen.total.sum() / max(seen.weight.sum(), 1e-9)) / (seen.weight + 1)
    error = asked.squares - 2 * mean * asked.total + mean**2 * asked.weight
    return float(error.sum() / max(asked.weight.sum(), 1e-9))


def _zero_nats(seen: _Moments, asked: _Moments) -> float:
    """Score how often each gene is expressed, with one value as often expressed as all genes added."""
    share = (seen.expressed + seen.expressed.sum() / max(seen.weight.sum(), 1e-9)) / (seen.weight + 1)
    nats = -xlogy(asked.expressed, share) - xlogy(asked.weight - asked.expressed, 1 - share)
    return float(nats.sum() / max(asked.weight.sum(), 1e-9))


def _level_nats(seen: FloatArray, asked: FloatArray) -> float:
    """Score the frequencies of the levels of each gene, with one level as frequent as in all genes added."""
    overall = (seen.sum(0) + 1) / (seen.sum() + seen.shape[1])
    share = (seen + overall) / (seen.sum(1, keepdims=True) + 1)
    return float(-xlogy(asked, share).sum() / max(asked.sum(), 1))


def _gene_nats(seen: FloatArray, asked: FloatArray, n_genes: int) -> float:
    """Score the frequency of each gene, with a pseudocount of one."""
    return float(-xlogy(asked, (seen + 1) / (seen.sum() + n_genes)).sum() / max(asked.sum(), 1))
