"""Initialisation of heads on embeddings of training cells, temperatures, and the warning about collapse."""

from __future__ import annotations

import copy
import json
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from messages import naming
from scipy.sparse import csr_matrix
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from scllm import datasets, models, settings, tl
from scllm.data.source import open_source
from scllm.engine.collapse import CollapseWatch
from scllm.engine.head_start import start_heads
from scllm.engine.objectives import Label
from scllm.engine.predict import predict
from scllm.engine.spec import Cells
from scllm.models.base import HeadSpec
from scllm.tl._model import gene_match

FAMILIES = ("scgpt", "geneformer", "scfoundation", "gpt2")


@pytest.fixture(scope="module")
def cells():
    return datasets.toy(n_cells=400)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, cells):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        built = models.build(request.param, vocab=cells.var_names, size="tiny").eval()
        labels = cells.obs["cell_type"].cat
        built.set_heads([HeadSpec("cell_type", tuple(labels.categories), pooling=built.head_pooling)])
    return built


def started(model, cells, rows, targets=None, **changed):
    tuned = copy.deepcopy(model)
    source = open_source(cells)
    targets = targets or {"cell_type": cells.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)}
    options = {"device": "cpu", "random_state": 0} | changed
    trained = Cells(rows, rows[:0], targets, options.pop("weights", None))
    start_heads(tuned, source, gene_match(cells, source, tuned), trained, Label(), **options)
    return tuned


def outputs(model, cells, forward) -> np.ndarray:
    source = open_source(cells)
    parts = predict(model, source, gene_match(cells, source, model), forward, device="cpu")
    return torch.cat([values for _, values in parts]).numpy()


def test_an_initialised_head_predicts_like_a_linear_probe_of_the_same_states(model, cells, caplog, monkeypatch):
    rows, tested = np.arange(0, 400, 2), np.arange(1, 400, 2)
    monkeypatch.setattr(settings, "verbosity", 3)
    with caplog.at_level("DEBUG", logger="scllm"):
        tuned = started(model, cells, rows)
    # with equal probabilities for four types, the loss would be log(4)
    assert float(re.search(r"the head 'cell_type' with a loss of (\S+)", caplog.text)[1]) < 0.8 * np.log(4)
    codes = cells.obs["cell_type"].cat.codes.to_numpy()
    answers = outputs(tuned, cells, lambda replica, batch: replica.head_outputs(batch)["cell_type"]).argmax(1)
    states = outputs(model, cells, lambda replica, batch: replica.head_inputs(batch))
    scaler = StandardScaler().fit(states[rows])
    probe = LogisticRegression(max_iter=2000).fit(scaler.transform(states[rows]), codes[rows])
    by_probe = (probe.predict(scaler.transform(states[tested])) == codes[tested]).mean()
    assert (answers[tested] == codes[tested]).mean() > by_probe - 0.08
    assert by_probe > 0.5  # chance is 0.25


def test_a_linear_head_is_the_logistic_regression_of_states_whitened_within_labels(cells):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build("scgpt", vocab=cells.var_names, size="tiny").eval()
    labels = cells.obs["cell_type"].cat
    model.set_heads([HeadSpec("cell_type", tuple(labels.categories), pooling="ranked", reads="both")])
    rows, missing = np.arange(300), np.arange(400) % 3 == 0
    column = np.where(missing, -1, labels.codes).astype(np.int64)
    tuned = started(model, cells, rows, {"cell_type": column})
    logits = outputs(tuned, cells, lambda replica, batch: replica.head_outputs(batch)["cell_type"])
    states = outputs(model, cells, lambda replica, batch: replica.head_inputs(batch)).astype(np.float64)
    known = rows[~missing[rows]]
    codes = column[known]
    within = sum((codes == k).mean() * np.cov(states[known][codes == k].T, bias=True) for k in np.unique(codes))
    variance, directions = np.linalg.eigh(within)
    # 0.3 times the mean variance is added to each
    white = (states - states[rows].mean(0)) @ directions / np.sqrt(variance + 0.3 * variance.mean())
    probe = LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(white[known], codes)
    expected = log_softmax(probe.decision_function(white), axis=1)
    np.testing.assert_allclose(log_softmax(logits, axis=1), expected, atol=0.01)


def test_a_head_is_not_overconfident_with_one_cell_per_label(model, cells):
    codes = cells.obs["cell_type"].cat.codes.to_numpy()
    rows = np.array([np.flatnonzero(codes == code)[0] for code in range(4)])
    tuned = started(model, cells, rows)
    logits = outputs(tuned, cells, lambda replica, batch: replica.head_outputs(batch)["cell_type"])
    chance = log_softmax(logits, axis=1)
    # equal probabilities would give log(4), overconfident wrong predictions far more
    assert -chance[np.arange(400), codes].mean() < 1.1 * np.log(4)


@pytest.mark.parametrize("most", [100_000, 120])
def test_several_heads_are_initialised_like_each_one_alone(cells, most, monkeypatch):
    monkeypatch.setattr("scllm.engine.head_start._MAX_CELLS", most)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build("scgpt", vocab=cells.var_names, size="tiny").eval()
    codes = cells.obs["cell_type"].cat.codes.to_numpy().astype(np.int64)
    depth = np.log(np.asarray(cells.X.sum(1)).ravel()).astype(np.float32)
    columns = {
        "type": np.where(np.arange(400) % 3 == 0, -1, codes),
        "few": np.where(np.arange(400) < 20, codes, -1),  # labels of ten training cells
        "depth": np.where(np.arange(400) % 5 == 1, np.nan, depth).astype(np.float32),
    }
    read = {"pooling": "ranked", "reads": "both"}
    specs = [HeadSpec("type", tuple("abcd"), **read), HeadSpec("few", tuple("abcd"), **read)]
    specs.append(HeadSpec("depth", None, mean=depth.mean(), std=depth.std(), **read))

    def said(specs) -> dict[str, np.ndarray]:
        model.set_heads(specs)
        tuned = started(model, cells, np.arange(0, 400, 2), columns)
        return {s.key: outputs(tuned, cells, lambda one, batch, key=s.key: one.head_outputs(batch)[key]) for s in specs}

    together = said(specs)
    for spec in specs if most > 200 else specs[1:2]:  # only heads that are fitted on all of their labelled cells
        np.testing.assert_allclose(together[spec.key], said([spec])[spec.key], atol=1e-4)
    assert np.corrcoef(together["depth"][1::2, 0], depth[1::2])[0, 1] > 0.5


def test_initialisation_changes_only_heads_and_no_global_random_state(model, cells):
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    tuned = started(model, cells, np.arange(100))
    again = started(model, cells, np.arange(100))
    assert torch.equal(states[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    for (name, weight), other in zip(tuned.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(weight, other)
        assert torch.equal(weight, model.state_dict()[name]) != name.startswith("heads.")


def test_cells_that_are_sampled_more_often_have_more_weight(model, cells):
    rows = np.arange(200)
    codes = cells.obs["cell_type"].cat.codes.to_numpy()[rows]
    weights = np.where(codes == 0, 50.0, 1.0)
    forward = lambda replica, batch: replica.head_outputs(batch)["cell_type"]  # noqa: E731
    alike, weighted = (outputs(started(model, cells, rows, weights=w), cells, forward) for w in (None, weights))
    assert (weighted.argmax(1) == 0).sum() > (alike.argmax(1) == 0).sum()


def test_fine_tuning_ends_no_worse_than_it_starts_and_is_calibrated(cells, tmp_path):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build("scgpt", vocab=cells.var_names, size="tiny")
    tuned = tl.finetune(cells, model, key="cell_type", epochs=2, validation=0.3, run_dir=tmp_path / "run")
    validation = tuned.history.query("split == 'validation'")
    assert validation["step"].iloc[0] == 0
    held = np.load(tmp_path / "run" / "cells.npz")["validation"]
    codes = cells.obs["cell_type"].cat.codes.to_numpy()[held]
    logits = outputs(tuned, cells, lambda replica, batch: replica.head_outputs(batch)["cell_type"])[held]
    before, after = (
        -log_softmax(logits / t, axis=1)[np.arange(len(held)), codes].mean() for t in (1.0, _temperature(tuned))
    )
    # the weights of the best epoch have the lowest loss of the history, which includes the initial weights
    assert before == pytest.approx(validation["loss"].min(), rel=1e-4)
    assert after <= before
    tl.classify(cells, tuned)
    expected = torch.from_numpy(logits / _temperature(tuned)).softmax(1).numpy()
    np.testing.assert_allclose(cells.obsm["scllm_label_probabilities"][held], expected, atol=1e-5)
    assert _temperature(models.load(tuned.path)) == _temperature(tuned) != 1


def _temperature(model) -> float:
    return model.head_specs[0].temperature


@pytest.fixture
def one_answer(cells, tmp_path):
    """Fine-tune a model that cannot do better than to predict one label."""
    adata = cells.copy()
    # labels are random, and cells of one label have a weight of zero
    adata.obs["chance"] = np.random.default_rng(0).choice(["rare", "common"], 400, p=[0.02, 0.98])
    model = models.build("scgpt", vocab=adata.var_names, size="tiny")
    return partial(tl.finetune, adata, model, key="chance", class_weight={"rare": 0}, run_dir=tmp_path / "run")


def test_a_model_that_predicts_only_one_label_is_warned_about(one_answer):
    with pytest.warns(UserWarning, match=naming("one label", "commonest_answer = 1", "upsample=True")):
        one_answer(epochs=1, batch_size=8)


def test_accuracy_of_several_heads_is_per_labelled_cell():
    heads = (HeadSpec("a", ("x", "y")), HeadSpec("depth:b", None))
    outputs = {"a": torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]), "depth:b": torch.full((4, 1), 3.0)}
    targets = {"label:a": torch.tensor([0, 0, -1, 0]), "label:depth:b": torch.tensor([1.0, np.nan, np.nan, np.nan])}
    objective = Label()
    loss = objective.of(heads, outputs, targets)
    means = {name: float(value) / int(loss.count) for name, value in {"loss": loss.sum, **loss.logged}.items()}
    reported = objective.report(means, 0)
    assert reported["accuracy_a"] == pytest.approx(2 / 3)
    assert reported["commonest_answer_a"] == pytest.approx(2 / 3)
    assert reported["mse_depth:b"] == pytest.approx(4)
    assert set(reported) == {"loss", "accuracy_a", "commonest_answer_a", "mse_depth:b"}
    # without labelled cells, no accuracy is reported
    loss = objective.of(heads, outputs, targets | {"label:depth:b": torch.full((4,), np.nan)})
    means = {name: float(value) / int(loss.count) for name, value in {"loss": loss.sum, **loss.logged}.items()}
    assert set(objective.report(means, 0)) == {"loss", "accuracy_a", "commonest_answer_a"}


def test_there_is_no_warning_if_nearly_all_cells_have_one_label(cells, tmp_path):
    adata = cells[cells.obs["cell_type"] == cells.obs["cell_type"].iloc[0]].copy()
    adata.obs["rare"] = np.where(np.arange(adata.n_obs) < 2, "yes", "no")
    # only these two cells express this gene
    counts = adata.X.toarray()
    counts[:, 0] = np.where(np.arange(adata.n_obs) < 2, 500, 0)
    adata.X = csr_matrix(counts)
    adata.obs["part"] = np.where(np.arange(adata.n_obs) % 5 == 4, "validation", "train")
    model = models.build("scgpt", vocab=adata.var_names, size="tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = tl.finetune(
            adata, model, key="rare", validation="part", epochs=1, batch_size=8, run_dir=tmp_path / "run"
        )
    # neither of the two cells is in the last steps or among the validation cells
    assert (tuned.history["commonest_answer"].tail(4) == 1).all()


@pytest.mark.filterwarnings("error")
def test_a_head_without_a_labelled_cell_in_some_steps_is_not_judged(tmp_path):
    lines = [{"step": step, "epoch": 0, "split": "train", "loss": 1.0} for step in range(1, 9)]
    for line in lines[:6:2]:
        line |= {"accuracy_few": 0.0, "commonest_answer_few": 1.0}
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    CollapseWatch(path).finish()
    with path.open("a") as file:
        file.writelines(json.dumps(line | {"step": 10 + line["step"]}) + "\n" for line in lines[:6:2])
    with pytest.raises(UserWarning, match=naming("one label", "commonest_answer_few = 1")):
        CollapseWatch(path).finish()


@pytest.mark.parametrize("options", [{"validation": 0}, {"config": tl.TrainConfig(log_every=1000)}], ids=str)
def test_the_warning_needs_neither_validation_cells_nor_training_lines(one_answer, options):
    with pytest.warns(UserWarning, match=naming("one label", "commonest_answer = 1")) as warned:
        one_answer(epochs=2, **options)
    assert len(warned) == 1


@pytest.mark.slow
def test_the_warning_also_comes_from_other_processes(one_answer):
    with pytest.warns(UserWarning, match=naming("one label", "commonest_answer = 1")):
        one_answer(epochs=2, n_procs=2, device="cpu")


@pytest.mark.parametrize("family", ["scgpt", "geneformer"])
def test_heads_that_published_formats_cannot_store_are_an_error(family, tmp_path):
    model = models.build(family, vocab=[f"g{i}" for i in range(9)], size="tiny")
    model.set_heads([HeadSpec("cell_type", ("a", "b"), pooling=model.head_pooling)])
    with pytest.raises(ValueError, match=naming("head_reads='published'", "format='native'")):
        model.save(tmp_path / "m", format=family)
