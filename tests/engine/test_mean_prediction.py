"""Loss of predictions that ignore the cell, compared with objectives that are given such predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import scllm
from scllm import models
from scllm.data.matching import match_source
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.engine.mean_prediction import mean_prediction
from scllm.engine.objectives import Label, MaskedExpression, MaskedLevel, MaskedValue, NextGene


def setting(family, adata, **config):
    """A model, and loaders of training and validation cells."""
    model = models.build(family, vocab=adata.var_names, size="tiny", **config).eval()
    source = open_source(adata)
    match, rows = match_source(source, model.vocab, gene_key=None, min_coverage=0.3), np.arange(adata.n_obs)
    training = Loader(source, rows[:80], match, model.encoder, model.vocab, 16)
    return model, training, replace(training, rows=rows[80:], training=False)


def tokens(loader):
    """The gene and the value of each token of all cells, specials included."""
    batches = [batch for parts in loader.epoch(0) for batch in parts]
    values = [torch.zeros(len(batch.genes)) if batch.values is None else batch.values for batch in batches]
    return torch.cat([batch.genes for batch in batches]), torch.cat(values)


def losses_over_epochs(model, objective, loader, n_epochs):
    """Mean of the losses with the masks of several epochs, weighted by the number of predictions."""
    sums, count = {}, 0
    for epoch in range(n_epochs):
        for step, (batch,) in enumerate(replace(loader, training=True, seed=epoch).epoch(0)):
            loss = objective(model, batch, 100 * epoch + step)
            count += loss.count
            for name, value in {"loss": loss.sum, **loss.logged}.items():
                sums[name] = sums.get(name, 0) + value
    return {name: float(value / count) for name, value in sums.items()}


def mean_of_each_gene(model, loader):
    """The mean of each gene in all cells, with one value of the overall mean added."""
    genes, values = tokens(replace(loader, training=False))
    known = ~model.is_special[genes]
    genes, values = genes[known], values[known]
    table = torch.full((len(model.vocab),), float(values.mean()))
    for gene in genes.unique():
        of_gene = values[genes == gene]
        table[gene] = (of_gene.sum() + values.mean()) / (len(of_gene) + 1)
    return table


@pytest.mark.parametrize("left_out", [0.0, 0.4])
def test_values_are_predicted_by_their_mean_whatever_the_masks(toy, left_out, monkeypatch):
    model, training, validation = setting("scgpt", toy)
    objective = MaskedValue(mask_ratio=(0.25, 0.5), left_out=left_out, from_cell=0.5)
    found = mean_prediction(model, objective, training, validation)
    # the objective itself, given the mean of each gene: states of tokens are their genes
    table = mean_of_each_gene(model, training)
    monkeypatch.setattr(model, "hidden", lambda batch: batch.genes[:, None])
    monkeypatch.setattr(model, "decode", lambda states, *_: {"value": table[states[:, 0]]})
    monkeypatch.setattr(model, "decode_cell", lambda cell, genes, *_: {"cell_value": table[genes]})
    expected = losses_over_epochs(model, objective, validation, 40)
    assert found["mean_prediction_mse"] == pytest.approx(expected["mse"], rel=0.02)
    total = found["mean_prediction_mse"] + 0.5 * found["mean_prediction_mse_cell"]
    assert found["mean_prediction"] == pytest.approx(total, rel=1e-5)
    if left_out:
        # random genes are mostly zero, so means of expressed genes are too high for them
        assert found["mean_prediction_mse_cell"] < expected["mse_cell"]
        # no table of genes is better: the best one for these very answers
        best = _best_table(model, objective, validation, monkeypatch)
        assert found["mean_prediction_mse_cell"] == pytest.approx(best, rel=0.1)
    else:
        assert found["mean_prediction_mse_cell"] == found["mean_prediction_mse"]


def _best_table(model, objective, loader, monkeypatch):
    """Loss from the cell embedding of the best value for each gene, found from the answers to all questions."""
    asked, logged = [], []

    def keep(predicted, target, weight=None):
        logged.append((target, torch.ones_like(target) if weight is None else weight))
        return ((predicted - target) ** 2).sum()

    monkeypatch.setattr("scllm.engine.losses.squared_error", keep)
    table = torch.zeros(len(model.vocab))
    monkeypatch.setattr(
        model, "decode_cell", lambda cell, genes, *_: asked.append(genes) or {"cell_value": table[genes]}
    )
    losses_over_epochs(model, objective, loader, 40)
    of_cell = logged[1::2]
    genes, target, weight = torch.cat(asked), torch.cat([a for a, _ in of_cell]), torch.cat([w for _, w in of_cell])
    error = 0.0
    for gene in genes.unique():
        y, w = target[genes == gene].double(), weight[genes == gene].double()
        error += float((w * (y - (w * y).sum() / w.sum()) ** 2).sum())
    return error / float(weight.sum())


def test_expression_is_predicted_with_zeros_as_often_as_they_are_asked_for(toy, monkeypatch):
    model, training, validation = setting("scfoundation", toy)
    objective = MaskedExpression(mask_ratio=(0.3,), zeros=0.1)
    found = mean_prediction(model, objective, training, validation)
    assert set(found) == {"mean_prediction"}

    # by hand: 3 of 10 expressed genes and 1 of 10 others are asked for
    def dense(loader):
        rows = np.zeros((len(loader.rows), toy.n_vars))
        cell = 0
        for parts in replace(loader, training=False).epoch(0):
            batch = parts[0]
            keep = ~model.is_special[batch.genes]
            rows[cell + batch.cell[keep].numpy(), batch.genes[keep].numpy()] = batch.values[keep].numpy()
            cell += batch.n_cells
        return rows

    seen, asked = dense(training), dense(validation)
    weigh = [np.where(rows > 0, 0.3, 0.1) for rows in (seen, asked)]
    overall = (weigh[0] * seen).sum() / weigh[0].sum()
    mean = ((weigh[0] * seen).sum(0) + overall) / (weigh[0].sum(0) + 1)
    expected = (weigh[1] * (asked - mean) ** 2).sum() / weigh[1].sum()
    assert found["mean_prediction"] == pytest.approx(expected, rel=1e-4)


def test_levels_are_predicted_by_their_frequencies(toy):
    model, training, validation = setting("scbert", toy)
    found = mean_prediction(model, MaskedLevel(), training, validation)["mean_prediction"]
    (genes, levels), (asked, right) = tokens(replace(training, training=False)), tokens(validation)
    nats = []
    for gene, level in zip(asked[right > 0].tolist(), right[right > 0].tolist(), strict=True):
        same = levels[(genes == gene) & (levels > 0)]
        overall = (float((levels == level).sum()) + 1) / (float((levels > 0).sum()) + model.config.n_levels)
        nats.append(-np.log((float((same == level).sum()) + overall) / (len(same) + 1)))
    assert found == pytest.approx(np.mean(nats), rel=1e-4)


def test_genes_are_predicted_by_their_frequencies_as_in_perplexity(toy):
    model, training, validation = setting("gpt2", toy)
    found = mean_prediction(model, NextGene(), training, validation)["mean_prediction"]
    genes, _ = tokens(replace(training, training=False))
    asked, _ = tokens(validation)
    known = np.bincount(genes[~model.is_special[genes]], minlength=len(model.vocab)) + 1.0
    asked = asked[~model.is_special[asked]]
    assert found == pytest.approx(-np.log(known / (known[: toy.n_vars].sum()))[asked].mean(), rel=1e-5)
    # the same genes scored by frequencies in these cells
    adata = toy[80:].copy()
    scllm.tl.perplexity(adata, model)
    assert found == pytest.approx(adata.uns["scllm"]["perplexity"]["unigram"], rel=0.02)


def test_without_validation_other_training_cells_are_scored_and_labels_have_no_baseline(toy):
    model, training, _ = setting("gpt2", toy)
    found = mean_prediction(model, NextGene(), training, None)
    halves = replace(training, rows=training.rows[::2]), replace(training, rows=training.rows[1::2])
    assert found == mean_prediction(model, NextGene(), *halves)
    assert mean_prediction(model, Label(), training, None) == {}
