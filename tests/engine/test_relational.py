"""The relational term: similarities of embeddings are regressed on those of principal components."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from engine.runs import assert_same_curve, curve, interrupted, pretrain
from messages import naming
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from scllm import models, tl
from scllm.data.matching import match_source
from scllm.data.reference import Reference
from scllm.data.source import open_source
from scllm.engine.gene_init import decompose, reference
from scllm.engine.loader import Loader
from scllm.engine.relational import COLUMN, Peers, constant_loss, relational_loss
from scllm.tl import TrainConfig

CONFIG = {"relational": True, "lr": 1e-3}


def components(data, vocab, *, thinned=True, rows=None):
    """Return the reference, and the loader of all cells with views."""
    source = open_source(data)
    match = match_source(source, vocab)
    rows = np.arange(source.n_obs) if rows is None else rows
    found = reference(decompose(source, match, rows, 50, len(vocab)), len(vocab), thinned=thinned)
    encoder = models.build("scgpt", vocab=vocab, size="tiny").encoder
    return found, Loader(source, np.arange(source.n_obs), match, encoder, vocab, 1000, reference=found)


def read(loader, epoch=0):
    """Return the cells of an epoch as one batch."""
    [[batch]] = list(loader.epoch(epoch))
    return batch


def logged(adata):
    counts = adata.X.toarray().astype(np.float64)
    return np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)


def test_the_reference_of_a_cell_is_its_principal_components(toy, model):
    _, loader = components(toy, model.vocab)
    found = read(Loader(**vars(loader) | {"training": False})).view.obs[COLUMN].numpy()
    # with fewer genes than components, these hold all that is known of a cell
    expected = PCA(n_components=40).fit_transform(logged(toy))
    np.testing.assert_allclose(found @ found.T, cosine_similarity(expected), atol=1e-4)


def test_a_gene_that_a_file_did_not_measure_has_its_mean(toy, model):
    whole, part = toy[:60].copy(), toy[60:, :30].copy()
    found, loader = components([whole, part], model.vocab)
    assert found.mean[30:40] == pytest.approx(logged(whole)[:, 30:].mean(0), rel=1e-5)
    coordinates = read(Loader(**vars(loader) | {"training": False})).view.obs[COLUMN].numpy()[60:]
    of_part = logged(part) - found.mean[:30]
    expected = of_part @ found.axes[:30]
    np.testing.assert_allclose(coordinates, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-4)


def test_views_have_the_depths_of_other_cells(toy, model):
    found, loader = components(toy, model.vocab)
    tokens = loader.match.tokens(toy.X.tocsr(), np.arange(toy.n_obs))
    keys = np.arange(toy.n_obs) * 7919
    thinned = found.at_other_depths(tokens, keys)
    totals = np.array([np.add.reduceat(each.values, each.indptr[:-1]) for each in (tokens, thinned)])
    assert (totals[1] <= totals[0]).all()
    is_lower = totals[1] < totals[0]
    # a cell in the middle is deeper than half of the others
    assert 0.3 < is_lower.mean() < 0.7
    assert totals[1].min() > 0.5 * found.depths.min()
    again = found.at_other_depths(tokens.take(np.arange(50, 60)), keys[50:60])
    np.testing.assert_array_equal(again.values, thinned.take(np.arange(50, 60)).values)
    kept = Reference(found.axes, found.mean, False, np.empty(0)).at_other_depths(tokens, keys)
    assert kept is tokens


def test_views_differ_between_epochs_and_not_between_reads(toy, model):
    _, loader = components(toy, model.vocab)
    first, again, second = (read(loader, epoch).view for epoch in (0, 0, 1))
    assert torch.equal(first.values, again.values)
    assert len(first.values) != len(second.values) or not torch.equal(first.values, second.values)


def test_the_loss_and_its_gradient_are_those_of_the_mean_over_all_pairs(toy, model):
    _, loader = components(toy, model.vocab)
    view = read(loader).view
    model.train(False)
    embeddings = torch.nn.functional.normalize(model.embed(view), dim=1)
    similar = embeddings @ embeddings.T - view.obs[COLUMN] @ view.obs[COLUMN].T
    expected = (similar**2).mean()
    expected.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    peers = Peers.embedded(model, [view.cells(0, 50), view.cells(50, view.n_cells)], "fp32")
    for part in (view.cells(0, 50), view.cells(50, view.n_cells)):
        loss = relational_loss(model, part, peers)
        (2 * loss.sum / view.n_cells).backward()
    assert relational_loss(model, view).sum.item() / view.n_cells == pytest.approx(expected.item(), rel=1e-5)
    assert len(gradients) > 10
    for name, weight in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-6)


def test_equal_embeddings_have_the_constant_loss(toy, model):
    _, loader = components(toy, model.vocab)
    view = read(loader).view
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.layers[-1].norm2.bias.fill_(1.0)
    found = relational_loss(model, view).sum.item() / view.n_cells
    assert found == pytest.approx(constant_loss(view.obs[COLUMN].numpy()), rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"config": {"accumulate": 4}},
        {"config": {"max_tokens": 64}},
        {"n_procs": 2},
        {"n_procs": 2, "config": {"accumulate": 3}},
        {"n_procs": 2, "config": {"strategy": "fsdp", "accumulate": 2}},
    ],
    ids=["accumulate", "max_tokens", "two processes", "two processes, accumulate", "fsdp"],
)
def test_micro_batches_and_processes_change_nothing(whole, toy, tmp_path, settings):
    settings = {"dropout": 0.0, **settings, "config": CONFIG | settings.get("config", {})}
    pretrain(toy, tmp_path / "run", **settings)
    assert_same_curve(curve(tmp_path / "run"), whole)


@pytest.fixture(scope="module")
def whole(_toy, tmp_path_factory):
    """The history of a run in one process."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    pretrain(_toy.copy(), run_dir, dropout=0.0, config=CONFIG)
    return curve(run_dir)


def test_the_history_has_the_term_and_its_baseline(whole):
    assert (whole["relational"] > 0).all()
    terms = whole["mse"] + whole["mse_cell"] + 4_000 * whole["relational"]
    np.testing.assert_allclose(whole["loss"], terms, rtol=1e-5)
    judged = whole[whole["split"] == "validation"]["relational"]
    assert judged.iloc[-1] < judged.iloc[0]
    assert (whole["mean_prediction_relational"] > 0).all()


def test_views_are_embedded_without_dropout(whole, toy, tmp_path):
    model = pretrain(toy, tmp_path / "run", dropout=0.5, epochs=None, config=CONFIG | {"steps": 1})
    assert model.config.dropout == 0.5
    found = curve(tmp_path / "run").query("split == 'train'")
    assert found["relational"].iloc[0] == pytest.approx(whole["relational"].iloc[0], rel=1e-5)
    assert found["mse"].iloc[0] != pytest.approx(whole["mse"].iloc[0], rel=1e-3)


def test_an_interrupted_run_resumes_to_the_same_curve(whole, toy, tmp_path):
    settings = {"dropout": 0.0, "config": CONFIG | {"save_every": 2}}
    interrupted(toy, tmp_path / "run", 9, **settings)
    pretrain(toy, tmp_path / "run", **settings)
    assert_same_curve(curve(tmp_path / "run"), whole)


@pytest.mark.parametrize("family", ["geneformer", "scbert", "scfoundation", "gpt2", "xlnet", "albert"])
def test_every_family_learns_the_term(toy, tmp_path, family):
    pretrain(toy, tmp_path / "run", model=family, epochs=4, config=CONFIG | {"lr": 3e-3})
    history = curve(tmp_path / "run")
    assert np.isfinite(history["loss"]).all()
    last = history[history["split"] == "validation"].iloc[-1]
    assert last["relational"] < 0.9 * last["mean_prediction_relational"]


def test_a_file_gives_the_components_of_memory(toy, model, tmp_path):
    toy.write_h5ad(tmp_path / "toy.h5ad")
    found, expected = (components(data, model.vocab)[0] for data in (tmp_path / "toy.h5ad", toy))
    np.testing.assert_array_equal(found.axes, expected.axes)
    np.testing.assert_array_equal(found.depths, expected.depths)


def test_logged_values_are_neither_logged_again_nor_downsampled(toy, model, caplog):
    values = anndata.AnnData(toy.X.copy(), toy.obs, toy.var)
    values.X = type(toy.X)(logged(toy).astype(np.float32))
    found, _ = components(values, model.vocab)
    expected, _ = components(toy, model.vocab)
    np.testing.assert_allclose(np.abs(found.axes[:, 0]), np.abs(expected.axes[:, 0]), atol=1e-4)
    assert not len(found.depths)
    assert "no counts" in caplog.text


def test_fine_tuning_has_no_relational_term(toy, model, tmp_path):
    with pytest.raises(TypeError, match=naming("relational=True", "pretrain")):
        tl.finetune(toy, model, key="cell_type", run_dir=tmp_path / "run", config=TrainConfig(relational=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "seen"),
    [({"relational_weight": 0.0}, "positive number"), ({"view_downsample": "deep"}, "view_downsample")],
)
def test_wrong_settings_are_errors(settings, seen):
    with pytest.raises(ValueError, match=naming(seen)):
        TrainConfig(**settings)
