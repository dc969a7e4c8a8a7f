"""Labels of genes: what is learned, from which genes, and what is written."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from messages import naming
from sklearn.metrics import average_precision_score

from scllm import models
from scllm.data.source import open_source
from scllm.engine.gene_init import start_from_data
from scllm.models import CellModel
from scllm.models.base import Batch, HeadSpec
from scllm.tl import classify, classify_genes
from scllm.tl._classify_genes import gene_folds
from scllm.tl._gene_states import choose_cells, gene_statistics, pooled
from scllm.tl._model import gene_match

METRICS = ["accuracy", "macro_f1", "balanced_accuracy", "auroc", "auprc"]


@pytest.fixture
def markers(adata) -> pd.Series:
    """The cell type that each of the first twenty genes marks."""
    return pd.Series(["marks A"] * 10 + ["marks B"] * 10, adata.var_names[:20])


@pytest.fixture
def initial(adata, tiny) -> CellModel:
    """A model whose gene embeddings are initialised from the data."""
    source = open_source(adata)
    start_from_data(tiny, source, gene_match(adata, source, tiny), np.arange(adata.n_obs))
    return tiny


def hidden(model: CellModel, batch: Batch) -> torch.Tensor:
    return model.hidden(batch)


@pytest.mark.parametrize("options", [{"freeze": "encoder"}, {"epochs": 2, "lr": 1e-3}], ids=["frozen", "trained"])
def test_simulated_markers_are_classified(adata, initial, markers, options):
    before = initial.hash()
    table = classify_genes(adata, initial, labels=markers, **options)
    assert table.columns.tolist() == METRICS
    assert table.index.names == ["method", "fold"]
    assert table.index.tolist() == [(m, f) for m in ("model", "baseline", "majority") for f in range(5)]
    means = table.groupby("method").mean()
    assert means.loc["model", "auroc"] > 0.9
    assert means.loc["baseline", "auroc"] > 0.9
    assert means.loc["majority", ["accuracy", "auroc"]].tolist() == [0.5, 0.5]
    # predictions are out of fold for labelled genes and missing for all others
    assert adata.var["gene_label"].notna().tolist() == [True] * 20 + [False] * 20
    right = adata.var["gene_label"][:20].astype(str) == markers
    assert right.mean() == pytest.approx(means.loc["model", "accuracy"])
    probabilities = adata.varm["gene_label_probabilities"]
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (40, 2))
    np.testing.assert_allclose(probabilities[:20].sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(adata.var["gene_label_prob"], probabilities.max(1))
    # the given model is unchanged and recorded
    assert (initial.hash(), initial.head_specs, adata.uns["scllm"]["model"]["hash"]) == (before, (), before)


def test_random_labels_are_not_learned(adata, initial):
    rng, found = np.random.default_rng(0), []
    for _ in range(5):
        drawn = pd.Series(rng.permutation(["x", "y"] * 20), adata.var_names)
        table = classify_genes(adata, initial, labels=drawn, freeze="encoder", baseline=False)
        found.append(table.loc["model", "auroc"].mean())
    assert 0.3 < np.mean(found) < 0.7


@given(
    sizes=st.lists(st.integers(2, 30), min_size=2, max_size=5),
    n_folds=st.integers(2, 6),
    seed=st.integers(0, 2**31),
)
def test_folds_are_stratified_and_contain_every_gene_once(sizes, n_folds, seed):
    codes = np.repeat(np.arange(len(sizes)), np.maximum(sizes, n_folds))
    fold = gene_folds(codes, n_folds, random_state=seed)
    assert set(fold) == set(range(n_folds))
    for code in np.unique(codes):
        counts = np.bincount(fold[codes == code], minlength=n_folds)
        assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(fold, gene_folds(codes, n_folds, random_state=seed))


def test_genes_of_a_fold_have_no_label_in_its_training(adata, initial, markers, tmp_path):
    options = {"epochs": 1, "n_folds": 4, "baseline": False, "validation": 0.2, "run_dir": tmp_path / "run"}
    classify_genes(adata, initial, labels=markers, **options)
    seen, n_cells = [], adata.X.getnnz(0)
    for number in range(4):
        objective = json.loads((tmp_path / "run" / f"fold-{number}" / "spec.json").read_text())["objective"]
        training, held_out = (set(np.concatenate(objective[name])) for name in ("genes", "held_out"))
        assert len(training & held_out) == 0
        assert len(held_out) == 3
        seen.append(set(range(20)) - training - held_out)
        # classes have equal total weight, and genes too, whatever their number of cells
        shares = [np.multiply(w, n_cells[g]) for w, g in zip(objective["weights"], objective["genes"], strict=True)]
        np.testing.assert_allclose(np.concatenate([share / share.mean() for share in shares]), 1)
        assert shares[0].sum() == pytest.approx(shares[1].sum())
    assert sorted(np.concatenate([list(fold) for fold in seen])) == list(range(20))


@pytest.mark.parametrize(("share", "n_held_out"), [(0.001, 1), (0.999, 14)])
def test_any_validation_fraction_leaves_a_gene_on_both_sides(adata, initial, markers, tmp_path, share, n_held_out):
    options = {"epochs": 1, "n_folds": 4, "baseline": False, "run_dir": tmp_path / "run"}
    classify_genes(adata, initial, labels=markers, validation=share, **options)
    for number in range(4):
        spec = json.loads((tmp_path / "run" / f"fold-{number}" / "spec.json").read_text())
        assert sum(map(len, spec["objective"]["held_out"])) == n_held_out


def test_pooled_states_are_means_over_single_cells(adata, initial):
    source = open_source(adata)
    match = gene_match(adata, source, initial)
    tokens = np.array([3, 17, 39, 25])
    cells = choose_cells(adata, source, match, initial.eval(), tokens, max_cells=1000, random_state=0)
    counts = adata.X.toarray()
    expected = []
    for token in tokens:
        states = []
        for cell in np.flatnonzero(counts[:, token]):
            sentence = initial.encoder(match.tokens(adata.X[[cell]]), initial.vocab, None, measured=match.measured)
            batch = Batch.from_tokens(sentence)
            with torch.no_grad():
                states.append(initial.hidden(batch)[batch.genes == token][0].numpy())
        expected.append(np.mean(states, axis=0))
    np.testing.assert_allclose(pooled(cells, initial, hidden), expected, atol=1e-5)


@pytest.mark.parametrize("max_cells", [1, 7, 1000])
def test_each_gene_is_averaged_over_at_most_max_cells(adata, initial, max_cells):
    source = open_source(adata)
    tokens = np.arange(40)
    cells = choose_cells(
        adata, source, gene_match(adata, source, initial), initial, tokens, max_cells=max_cells, random_state=0
    )
    n_expressing = np.asarray((adata.X > 0).sum(0)).ravel()
    np.testing.assert_array_equal(cells.n_cells, np.minimum(n_expressing, max_cells))
    # every used pair is a gene and a cell that expresses it
    there = adata[cells.adata.obs_names].X > 0
    assert (cells.used > there).nnz == 0


@pytest.mark.parametrize("freeze", ["encoder", 1])
def test_the_order_of_cells_and_labels_does_not_matter(adata, initial, markers, freeze):
    options = {"freeze": freeze, "epochs": 1, "max_cells": 5, "n_folds": 2, "baseline": False}
    classify_genes(adata, initial, labels=markers, **options)
    shuffled = adata[np.random.default_rng(0).permutation(60)].copy()
    classify_genes(shuffled, initial, labels=markers[::-1], **options)
    np.testing.assert_array_equal(shuffled.varm["gene_label_probabilities"], adata.varm["gene_label_probabilities"])


def test_the_same_run_directory_continues(adata, initial, markers, tmp_path):
    options = {"epochs": 1, "n_folds": 2, "baseline": False, "run_dir": tmp_path / "run"}
    first = classify_genes(adata, initial, labels=markers, **options)
    done = [(tmp_path / "run" / f"fold-{k}" / "done").stat().st_mtime_ns for k in range(2)]
    pd.testing.assert_frame_equal(classify_genes(adata, initial, labels=markers, **options), first)
    assert done == [(tmp_path / "run" / f"fold-{k}" / "done").stat().st_mtime_ns for k in range(2)]
    with pytest.raises(ValueError, match="Expected the settings of the run in"):
        classify_genes(adata, initial, labels=dict(zip(markers.index, markers[::-1], strict=True)), **options)


def test_folds_keep_weights_only_on_request(adata, initial, markers, tmp_path):
    options = {"labels": markers, "epochs": 1, "n_folds": 2, "baseline": False}
    first = classify_genes(adata, initial, run_dir=tmp_path / "run", **options)
    kept = classify_genes(adata.copy(), initial, run_dir=tmp_path / "kept", keep_models=True, **options)
    pd.testing.assert_frame_equal(first, kept)
    names = {name: {f.name for f in (tmp_path / name / "fold-1").iterdir()} for name in ("run", "kept")}
    assert names["kept"] - names["run"] == {"model", "best_model.pt", "last.pt", "checkpoints"}


def test_a_head_on_genes_is_saved_and_loaded(adata, initial, markers, tmp_path):
    classify_genes(adata, initial, labels=markers, epochs=1, n_folds=2, run_dir=tmp_path / "run", keep_models=True)
    tuned = models.load(tmp_path / "run" / "fold-0")
    assert tuned.head_specs == (HeadSpec("gene_label", ("marks A", "marks B"), level="gene"),)
    tuned.save(tmp_path / "saved")
    again = models.load(tmp_path / "saved")
    match = gene_match(adata, open_source(adata), initial)
    batch = Batch.from_tokens(initial.encoder(match.tokens(adata.X), initial.vocab, None, measured=match.measured))
    with torch.no_grad():
        logits = tuned.gene_head_outputs(batch)["gene_label"]
        assert logits.shape == (len(batch.genes), 2)
        assert torch.equal(again.gene_head_outputs(batch)["gene_label"], logits)
        assert again.head_outputs(batch) == {}
    with pytest.raises(ValueError, match=naming("heads", "genes only", "tl.finetune")):
        classify(adata, again)


@pytest.mark.parametrize("family", sorted(set(models.families()) - {"spatial"}))
def test_every_family_has_hidden_states_of_genes(adata, markers, family):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build(family, vocab=adata.var_names, size="tiny")
    table = classify_genes(adata, model, labels=markers, n_folds=2, max_cells=3, freeze="encoder", baseline=False)
    assert table.loc["model"].notna().all(axis=None)
    assert adata.var["gene_label"].notna().sum() == 20
    model.set_heads((HeadSpec("kind", ("a", "b", "c"), level="gene"), HeadSpec("type", ("d", "e"))))
    assert list(model.heads_on("gene")) == ["kind"]
    assert list(model.heads_on("cell")) == ["type"]


@pytest.mark.parametrize("how", ["mapping", "table", "symbols in a table", "column", "booleans", "versions"])
def test_labels_come_in_several_forms(adata, initial, markers, how):
    options = {"freeze": "encoder", "n_folds": 2, "baseline": False}
    classify_genes(adata, initial, labels=markers, **options)
    expected = adata.varm["gene_label_probabilities"].copy()
    ids = pd.Series([f"ENSG{i:011d}" for i in range(40)], adata.var_names)
    labels: object = markers
    match how:
        case "mapping":
            labels = dict(markers)
        case "table":
            labels = pd.DataFrame({"marks": markers})
        case "symbols in a table":
            labels = pd.DataFrame({"gene_symbol": markers.index, "marks": markers.to_numpy()}, ids[:20])
        case "column":
            adata.var["marks"] = markers.reindex(adata.var_names).astype("category")
            labels = "marks"
        case "booleans":
            labels = markers == "marks B"
        case "versions":
            adata.var["ensembl_id"] = ids + ".7"
            labels = markers.set_axis(ids[:20])
    classify_genes(adata, initial, labels=labels, **options)
    np.testing.assert_allclose(adata.varm["gene_label_probabilities"], expected, atol=1e-6)


def test_labels_of_genes_that_are_not_in_the_data_are_ignored(adata, initial, markers):
    more = pd.concat([markers, pd.Series("marks A", ["elsewhere_1", "elsewhere_2"])])
    # a gene without counts has no hidden state
    adata.X.data[adata.X.indices == 0] = 0
    adata.X.eliminate_zeros()
    classify_genes(adata, initial, labels=more, freeze="encoder", n_folds=3, baseline=False)
    assert adata.var["gene_label"].notna().tolist() == [False] + [True] * 19 + [False] * 20
    assert adata.uns["scllm"]["classify_genes"]["params"]["n_genes"] == 19


@pytest.mark.parametrize("format", ["h5ad", "zarr"])
def test_results_of_gene_labels_can_be_written_to_files(adata, initial, markers, tmp_path, format):
    table = classify_genes(adata, initial, labels=markers, freeze="encoder", n_folds=2)
    path = tmp_path / f"cells.{format}"
    getattr(adata, f"write_{format}")(path)
    again: AnnData = getattr(ad, f"read_{format}")(path)
    assert again.var["gene_label"].equals(adata.var["gene_label"])
    entry = again.uns["scllm"]["classify_genes"]
    assert list(entry["classes"]) == ["marks A", "marks B"]
    long = entry["table"]
    assert len(long) == table.size
    row = long[(long["method"] == "baseline") & (long["fold"] == 1) & (long["metric"] == "auroc")]
    assert row["value"].item() == table.loc[("baseline", 1), "auroc"]


def test_class_weights_find_the_rare_label(adata, initial, markers):
    rare = markers.iloc[[*range(10), *range(10, 13)]].map({"marks A": "common", "marks B": "rare"})
    options = {"freeze": "encoder", "n_folds": 3, "baseline": False}
    found = {}
    for weight in ("balanced", None):
        classify_genes(adata, initial, labels=rare, class_weight=weight, **options)
        found[weight] = adata.varm["gene_label_probabilities"][:13, 1].mean()
    assert found["balanced"] > found[None]


def test_no_genes_are_held_out_and_nothing_is_drawn_with_a_frozen_encoder(adata, initial, markers):
    state = torch.get_rng_state()
    options = {"labels": markers, "freeze": "encoder", "n_folds": 3, "baseline": False}
    everything = classify_genes(adata, initial, **options)
    assert classify_genes(adata, initial, validation=0.9, **options).equals(everything)
    assert torch.equal(torch.get_rng_state(), state)


def test_average_precision_is_of_the_class_that_is_rarer_in_all_genes(adata, initial):
    # 6 of 13 genes have the rare label, and in one fold both classes are equally frequent
    codes = np.array([0, 1] * 6 + [0])
    names = pd.Series(np.array(["common", "rare"])[codes], adata.var_names[10:23])
    table = classify_genes(adata, initial, labels=names, freeze="encoder", n_folds=2, baseline=False)
    fold, probabilities = gene_folds(codes, 2), adata.varm["gene_label_probabilities"][10:23]
    assert sorted(codes[fold == number].mean() for number in range(2))[1] == 0.5
    for number in range(2):
        at = fold == number
        expected, of_the_other = (average_precision_score(codes[at] == k, probabilities[at, k]) for k in (1, 0))
        assert table.loc[("model", number), "auprc"] == pytest.approx(expected)
        assert expected != pytest.approx(of_the_other)


@pytest.mark.parametrize("loss", ["ce", "dice", "focal", {"ce": 1.0, "bce": 0.5}], ids=str)
def test_simulated_markers_are_classified_with_every_loss(adata, initial, markers, loss):
    table = classify_genes(adata, initial, labels=markers, loss=loss, freeze="encoder", baseline=False)
    assert table.loc["model", "auroc"].mean() > 0.9


def test_a_layer_is_read(adata, initial, markers):
    options = {"labels": markers, "freeze": "encoder", "n_folds": 2}
    classify_genes(adata, initial, **options)
    expected = adata.varm["gene_label_probabilities"].copy()
    adata.layers["counts"], adata.X = adata.X, adata.X[:, ::-1]
    classify_genes(adata, initial, layer="counts", **options)
    np.testing.assert_array_equal(adata.varm["gene_label_probabilities"], expected)


def test_statistics_of_genes_are_those_of_numpy(adata, initial):
    source, genes = open_source(adata), np.arange(40)
    match = gene_match(adata, source, initial)
    cells = choose_cells(adata, source, match, initial, genes, max_cells=1000, random_state=0)
    counts = cells.adata.X.toarray().astype(float)
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    simple = np.column_stack([logged.mean(0), logged.var(0), (counts > 0).mean(0)])
    found = gene_statistics(cells, len(initial.vocab))
    np.testing.assert_allclose(found[:, :3], np.log(simple + 1 / (1e4 * len(counts))), rtol=1e-5)
    _, strength, directions = np.linalg.svd((logged - logged.mean(0)) / logged.std(0), full_matrices=False)
    loadings = directions[:10].T * strength[:10] / np.sqrt(len(counts) - 1)
    np.testing.assert_allclose(np.abs(found[:, 3:]), np.abs(loadings), atol=1e-5)
