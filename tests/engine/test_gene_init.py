"""Initial gene embeddings from the data."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scanpy as sc
import torch

from scllm import datasets, models
from scllm.data import genes
from scllm.data.matching import match_source
from scllm.data.source import open_source
from scllm.engine.gene_init import gene_vectors, start_from_data


@pytest.fixture(scope="module")
def cells():
    return datasets.toy(n_cells=300, n_genes=80)


def test_vectors_are_the_strongest_singular_vectors_of_the_logged_counts(cells):
    vocab = models.Vocab.from_genes(cells.var_names)
    match = genes.match(cells.var_names, vocab)
    found = gene_vectors(open_source(cells), match, np.arange(cells.n_obs), 16, len(vocab))[: cells.n_vars]
    logged = sc.pp.log1p(sc.pp.normalize_total(cells, target_sum=1e4, inplace=False)["X"])
    _, strength, right = np.linalg.svd(logged.toarray(), full_matrices=False)
    kept = np.flatnonzero(np.abs(found).sum(0))
    assert len(kept) >= 2
    for number in kept[:2]:
        slow = (right[number] - right[number].mean()) / right[number].std()
        assert abs(np.corrcoef(slow, found[:, number])[0, 1]) > 0.999
    # the first (mean expression) has the same weight as the second; the others are weighted by their singular value
    strength[0] = strength[1]
    np.testing.assert_allclose(found[:, kept].mean(0), 0, atol=1e-5)
    spread = found[:, kept].std(0)
    np.testing.assert_allclose(spread / spread[0], strength[kept] / strength[kept[0]], rtol=1e-2)


def test_vectors_do_not_depend_on_the_number_of_rows_read_at_once(cells, monkeypatch):
    vocab = models.Vocab.from_genes(cells.var_names)
    match = genes.match(cells.var_names, vocab)
    whole = gene_vectors(open_source(cells), match, np.arange(300), 8, len(vocab))
    monkeypatch.setattr("scllm.engine.gene_init._ROWS", 37)
    np.testing.assert_allclose(gene_vectors(open_source(cells), match, np.arange(300), 8, len(vocab)), whole, atol=1e-4)


def test_genes_that_a_file_did_not_measure_are_not_zero_in_its_cells(cells):
    parts = [cells[:150].copy(), cells[150:, 20:].copy()]
    vocab = models.Vocab.from_genes(cells.var_names)
    source = open_source(parts)
    found = gene_vectors(source, match_source(source, vocab), np.arange(300), 16, len(vocab))[: cells.n_vars]
    logged = np.zeros((300, cells.n_vars))
    for rows, columns, part in ((slice(0, 150), slice(None), parts[0]), (slice(150, 300), slice(20, None), parts[1])):
        normalised = sc.pp.normalize_total(part, target_sum=1e4, inplace=False)["X"]
        logged[rows, columns] = np.log1p(normalised.toarray())
    logged[150:, :20] = logged[:150, :20].mean(0)
    right = np.linalg.svd(logged, full_matrices=False)[2]
    for number in range(2):
        assert abs(np.corrcoef(right[number], found[:, number])[0, 1]) > 0.999


def test_genes_that_are_not_measured_keep_their_initial_embedding(cells):
    model = models.build("scgpt", vocab=[*cells.var_names, "elsewhere"], size="tiny")
    before = model.gene_table().detach().clone()
    match = genes.match(cells.var_names, model.vocab)
    start_from_data(model, open_source(cells), match, np.arange(300))
    changed = (model.gene_table() != before).any(1)
    assert changed[:80].all()
    assert not changed[80:].any()
    assert torch.isfinite(model.gene_table()).all()


def test_cells_on_disk_are_read_once_and_give_the_same_bits(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("scllm.engine.gene_init._ROWS", 37)
    cells[:150].write_h5ad(tmp_path / "a.h5ad")
    cells[150:, 20:].copy().write_h5ad(tmp_path / "b.h5ad")
    vocab = models.Vocab.from_genes(cells.var_names)
    n_read = []
    for data in (tmp_path, [cells[:150].copy(), cells[150:, 20:].copy()]):
        source = open_source(data)
        read, rows = source.read, []
        monkeypatch.setattr(source, "read", lambda asked, read=read, rows=rows: (rows.extend(asked), read(asked))[1])
        match = match_source(source, vocab)
        n_read.append((gene_vectors(source, match, np.arange(0, 300, 2), 8, len(vocab)), rows))
    (on_disk, rows), (in_memory, _) = n_read
    np.testing.assert_array_equal(on_disk, in_memory)
    assert rows == list(range(0, 300, 2))


def test_cells_are_read_in_each_pass_if_a_copy_would_fill_the_disk(cells, tmp_path, monkeypatch, caplog):
    cells.write_h5ad(tmp_path / "a.h5ad")
    source, vocab = open_source(tmp_path / "a.h5ad"), models.Vocab.from_genes(cells.var_names)
    match = match_source(source, vocab)
    copied = gene_vectors(source, match, np.arange(300), 8, len(vocab))
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("scllm.engine.gene_init.shutil.disk_usage", lambda folder: full)
    with caplog.at_level("INFO", "scllm"):
        np.testing.assert_array_equal(gene_vectors(source, match, np.arange(300), 8, len(vocab)), copied)
    assert "TMPDIR" in caplog.text
