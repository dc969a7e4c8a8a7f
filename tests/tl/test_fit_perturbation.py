"""Predicted perturbations: training, the split, baselines, the ceiling, drugs, and abstaining."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from messages import naming
from scipy import sparse

from scllm import models, tl
from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.tl._perturbation_baselines import Task, baselines
from scllm.tl._perturbed_cells import changes, half_changes, log_normalised, read_screen

N_GENES, FAST = 20, {"epochs": 1, "batch_size": 32, "n_decoders": 2, "device": "cpu"}
GENES = [f"gene_{i}" for i in range(N_GENES)]


def screen_of(perturbations, rates, n=12, n_control=40, seed=0):
    """Counts of perturbed and control cells of two batches, of which the second is twice as deep."""
    rng, rows, labels = np.random.default_rng(seed), [], []
    for name in ["control", *perturbations]:
        for _ in range(n_control if name == "control" else n):
            rows.append(rates(name))
            labels.append(name)
    batch = np.arange(len(rows)) % 2
    counts = rng.poisson(np.array(rows) * (1 + batch[:, None])).astype(np.float32)
    obs = pd.DataFrame({"target": labels, "batch": batch.astype(str)}, index=[f"cell_{i}" for i in range(len(rows))])
    return AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def of_genes(name):
    """Each gene changes the genes of its own module, up or down."""
    rate = np.full(N_GENES, 4.0)
    for part in name.split("+"):
        if part.startswith("gene_"):
            i = int(part.removeprefix("gene_"))
            rate[i % 4 :: 4] *= 0.3 if i % 2 else 2.5
            rate[i] *= 0.2
    return rate


@pytest.fixture(scope="module")
def _screen():
    return screen_of([*GENES[:8], "gene_0+gene_1", "unmeasured"], of_genes)


@pytest.fixture
def screen(_screen):
    return _screen.copy()


@pytest.fixture(scope="module")
def start():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sizes = {"n_layers": 1, "n_heads": 2, "d_model": 16, "d_hidden": 16}
        return models.build("scgpt", vocab=GENES, **sizes).eval()


def fit(adata, start, **options):
    with pytest.warns(UserWarning, match="unmeasured"):
        return tl.fit_perturbation(adata, start, key="target", control="control", **{**FAST, **options})


@pytest.fixture(scope="module")
def fitted(_screen, start, tmp_path_factory):
    adata = _screen.copy()
    options = {"batch_key": "batch", "held_out": ["gene_6", "gene_7", "gene_0+gene_1", "unmeasured"]}
    model = fit(adata, start, run_dir=tmp_path_factory.mktemp("runs") / "run", **options)
    return adata, model


def test_tables_hold_every_method_and_metric_of_held_out_perturbations(fitted):
    adata, model = fitted
    entry = adata.uns["scllm"]["perturbation"]
    table = entry["table"]
    assert set(table["perturbation"]) == {"gene_6", "gene_7", "gene_0+gene_1", "unmeasured"}
    methods = {"model", "no change", "mean", "additive", "matching mean", "linear", "replicate"}
    kinds = ("nearest neighbours", "ridge", "random forest")
    assert set(table["method"]) == methods | {f"{k} ({t})" for k in kinds for t in ("trained genes", "initial genes")}
    of = table.set_index(["perturbation", "method", "metric"])["score"]
    assert np.isfinite(of["gene_6", "model", "mse"])
    assert np.isnan(of["unmeasured", "model", "mse"])
    assert np.isfinite(of["unmeasured", "mean", "mse"])
    assert np.isnan(of["gene_6", "additive", "mse"])
    assert np.isfinite(of["gene_0+gene_1", "additive", "mse"])
    split = entry["split"].set_index("perturbation")
    assert not split.loc["unmeasured", "has_genes"]
    assert model.config.perturbed == ("gene_0", "gene_1", "gene_2", "gene_3", "gene_4", "gene_5")
    summary = entry["summary"]
    scaled = summary.dropna(subset="scaled").set_index(["among", "metric", "method"])["scaled"]
    assert len(scaled)
    assert scaled.xs("mean", level="method").to_numpy() == pytest.approx(0)
    assert scaled.xs("replicate", level="method").to_numpy() == pytest.approx(1)
    row = summary.set_index(["among", "metric", "method"]).loc[("all", "pearson", "mean")]
    each = table[(table["method"] == "mean") & (table["metric"] == "pearson")]
    assert row["n"] == 4
    assert row["n_unscaled"] == each["scaled"].isna().sum()
    assert set(entry["abstention"]["n_kept"]) == {1, 2, 3}


def test_the_result_does_not_depend_on_the_order_of_cells_and_survives_files(fitted, tmp_path):
    adata, _ = fitted
    adata.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad").uns["scllm"]["perturbation"]
    pd.testing.assert_frame_equal(back["summary"], adata.uns["scllm"]["perturbation"]["summary"], check_dtype=False)
    screen = read_screen(adata, "target", "control", "batch")
    order = np.random.default_rng(0).permutation(adata.n_obs)
    shuffled = read_screen(adata[order].copy(), "target", "control", "batch")
    source = open_source(adata)
    x = log_normalised(source, match(source.genes, models.Vocab.from_genes(GENES)), np.arange(adata.n_obs))
    found = [changes(values, one, [0, 1]) for values, one in ((x, screen), (x[order], shuffled))]
    np.testing.assert_allclose(found[0].change, found[1].change, atol=1e-6)


def test_changes_are_those_against_controls_of_the_same_batch(screen):
    found_screen = read_screen(screen, "target", "control", "batch")
    source = open_source(screen)
    x = log_normalised(source, match(source.genes, models.Vocab.from_genes(GENES)), np.arange(screen.n_obs))
    dense, batch = x.toarray(), screen.obs["batch"].to_numpy()
    label = screen.obs["target"].to_numpy()
    cells = np.flatnonzero(label == "gene_3")
    controls = {b: dense[(label == "control") & (batch == b)].mean(0) for b in "01"}
    expected = np.mean([dense[cell] - controls[batch[cell]] for cell in cells], axis=0)
    p = found_screen.names.index("gene_3")
    np.testing.assert_allclose(changes(x, found_screen, [p]).change[0], expected, atol=1e-5)
    first, second = half_changes(x, found_screen, [p], 0)
    assert not np.allclose(first.change, second.change)


def test_changes_have_welchs_t(screen):
    from scipy.stats import ttest_ind

    screen.obs["batch"] = "one"
    one = read_screen(screen, "target", "control", "batch")
    source = open_source(screen)
    x = log_normalised(source, match(source.genes, models.Vocab.from_genes(GENES)), np.arange(screen.n_obs))
    p = one.names.index("gene_3")
    expected = ttest_ind(x.toarray()[one.cells(p)], x.toarray()[one.cells(-1)], equal_var=False)
    found = changes(x, one, [p])
    np.testing.assert_allclose(found.t[0], expected.statistic, rtol=1e-4)
    np.testing.assert_allclose(found.degrees[0], expected.df, rtol=1e-3)


def test_held_out_perturbations_are_not_read_in_training(screen, start):
    """Other counts of the held-out cells give the same weights."""
    weights = []
    for factor in (1, 3):
        adata = screen.copy()
        is_held_out = (adata.obs["target"] == "gene_6").to_numpy()
        scale = np.where(is_held_out, factor, 1).astype(np.float32)
        adata.X = sparse.csr_matrix(adata.X.multiply(scale[:, None]), dtype=np.float32)
        weights.append(fit(adata, start, held_out=["gene_6", "unmeasured"]).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_finished_run_is_returned_and_an_unchanged_start_model_is_left(screen, start, tmp_path):
    before = start.hash()
    first = fit(screen, start, held_out=["gene_6", "unmeasured"], run_dir=tmp_path / "run")
    again = fit(screen, start, held_out=["gene_6", "unmeasured"], run_dir=tmp_path / "run")
    assert first.hash() == again.hash() != before == start.hash()
    with pytest.raises(ValueError, match=r"data\.cells"):
        fit(screen, start, held_out=["gene_7", "unmeasured"], run_dir=tmp_path / "run")


def test_batches_hold_control_cells_and_their_targets(screen, start):
    source = open_source(screen)
    found = match(source.genes, start.vocab)
    inputs = np.arange(screen.n_obs)[::-1].copy()
    loader = Loader(source, np.array([3, 70, 5]), found, start.encoder, start.vocab, 2, inputs=inputs, keep_whole=True,
                    training=False)  # fmt: skip
    read = [part for parts in loader.epoch(0) for part in parts]
    for batch, rows in zip(read, ([3, 70], [5]), strict=True):
        plain = Loader(source, np.array(rows), found, start.encoder, start.vocab, 2, training=False)
        shown = Loader(source, inputs[rows], found, start.encoder, start.vocab, 2, training=False)
        (expected,), (targets,) = next(shown.epoch(0)), next(plain.epoch(0))
        assert torch.equal(batch.genes, expected.genes)
        assert torch.equal(batch.values, expected.values)
        assert torch.equal(batch.whole.values, targets.values)


def test_predictions_are_written_for_each_gene_and_cell(fitted, tmp_path):
    adata, model = fitted
    controls = adata[(adata.obs["target"] == "control").to_numpy(), GENES[::-1]].copy()
    other = tl.predict_perturbation(controls, model, genes="gene_6", copy=True)
    assert "predicted" not in controls.layers
    tl.predict_perturbation(controls, model, genes=["gene_6", ("gene_0", "gene_1")])
    assert set(controls.layers) == {"predicted_gene_6", "predicted_gene_0+gene_1"}
    np.testing.assert_array_equal(other.layers["predicted"], controls.layers["predicted_gene_6"])
    sorted_genes = tl.predict_perturbation(controls[:, GENES].copy(), model, genes="gene_6", copy=True)
    np.testing.assert_allclose(sorted_genes.layers["predicted"], other[:, GENES].layers["predicted"], atol=1e-5)
    entry = other.uns["scllm"]["predict_perturbation"]
    source = open_source(controls)
    x = log_normalised(source, match(source.genes, model.vocab), np.arange(controls.n_obs)).mean(0)
    change = entry["changes"].set_index("gene")["change"]
    np.testing.assert_allclose(
        change[GENES], sorted_genes.layers["predicted"].mean(0) - np.asarray(x).ravel(), atol=1e-4
    )
    other.write_h5ad(tmp_path / "a.h5ad")


def test_an_unsure_model_abstains(fitted):
    adata, model = fitted
    with pytest.warns(UserWarning, match="min_confidence"):
        tl.predict_perturbation(adata, model, genes="gene_6", min_confidence=1.0)
    assert np.isnan(adata.layers["predicted"]).all()
    table = adata.uns["scllm"]["predict_perturbation"]["table"]
    assert not table["predicted"].any()
    assert 0 <= table["confidence"].iloc[0] < 1


def test_planted_changes_that_follow_gene_embeddings_are_predicted_for_held_out_genes():
    """A model of which attention does not find the flag stays at the mean, though ridge regression finds the change."""
    rng, genes = np.random.default_rng(0), [f"gene_{i}" for i in range(60)]
    place, base = rng.normal(size=(60, 3)), rng.gamma(2.0, 3.0, 60) + 0.5
    effects = rng.normal(0, 0.8 / np.sqrt(3), (3, 60))
    rates = {"control": base} | {genes[i]: base * np.exp(place[i] @ effects) for i in range(40)}
    labels = [name for name in rates for _ in range(200 if name == "control" else 30)]
    counts = rng.poisson([rates[name] for name in labels]).astype(np.float32)
    obs = pd.DataFrame({"target": labels}, index=[f"cell_{i}" for i in range(len(labels))])
    adata = AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = models.build("scgpt", vocab=genes, n_layers=1, n_heads=4, d_model=32, d_hidden=64).eval()
        with torch.no_grad():
            model.gene_embedding.weight[:60] = torch.from_numpy(place @ rng.normal(0, 0.1, (3, 32))).float()
    tl.fit_perturbation(
        adata, model, key="target", control="control", held_out=0.25, epochs=8, batch_size=32, n_decoders=1,
        device="cpu",
    )  # fmt: skip
    # the default follows the width of 32
    assert adata.uns["scllm"]["fit_perturbation"]["params"]["lr"] == pytest.approx(1e-4 * 512 / 32)
    score = adata.uns["scllm"]["perturbation"]["summary"].set_index(["metric", "method"])["score"]
    assert score["pearson", "ridge (initial genes)"] > 0.8
    assert score["pearson", "model"] > 0.6
    assert score["mse", "model"] < 0.7 * score["mse", "mean"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_the_same_as_one(screen, start, tmp_path, strategy):
    adata = screen[:, :].copy()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    options = {"held_out": ["gene_6", "unmeasured"], "config": tl.TrainConfig(strategy=strategy, steps=3)}
    one, two = (
        fit(adata, start, n_procs=n, run_dir=tmp_path / str(n), **{**options, "epochs": None}).state_dict()
        for n in (1, 2)
    )
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_predictions_do_not_depend_on_the_order_of_cells_and_are_the_same_from_files(fitted, tmp_path):
    adata, model = fitted
    controls = adata[(adata.obs["target"] == "control").to_numpy()].copy()
    tl.predict_perturbation(controls, model, genes="gene_6")
    predicted = controls.layers["predicted"]
    other = tl.predict_perturbation(controls[::-1].copy(), model, genes="gene_6", copy=True)
    np.testing.assert_allclose(other.layers["predicted"][::-1], predicted, atol=1e-5)
    controls.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    tl.predict_perturbation(backed, model, genes="gene_6")
    np.testing.assert_allclose(backed.layers["predicted"], predicted, atol=1e-5)
    backed.file.close()


def test_backed_data_are_read(screen, start, tmp_path):
    """Files are read in another order in training; the measured changes are the same."""
    options = {"held_out": ["gene_6", "unmeasured"]}
    screen.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    tables = []
    for one in (screen, backed):
        fit(one, start, **options)
        tables.append(one.uns["scllm"]["perturbation"]["summary"].set_index(["among", "metric", "method"]))
    kept = [table.loc[table.index.get_level_values("method").isin(["mean", "linear", "replicate"])] for table in tables]
    pd.testing.assert_frame_equal(*kept, rtol=1e-5)
    assert np.isfinite(tables[1].loc[("all", "mse", "model"), "score"])
    backed.file.close()


def test_cells_that_cannot_be_compared_are_counted_in_warnings(screen, start):
    label = screen.obs["target"].astype(str).to_numpy()
    screen.obs["lane"] = np.where((label == "gene_1") & (np.arange(screen.n_obs) % 3 == 0), "alone", "shared")
    few = screen[(label != "gene_2") | (np.cumsum(label == "gene_2") <= 2)].copy()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = read_screen(few, "target", "control", "lane")
    said = " ".join(str(one.message) for one in seen)
    assert "4 perturbed cells are of batches without control cells ('alone')" in said
    assert "'gene_2' have fewer than 4 cells" in said
    assert "gene_2" not in found.names
    alone = found.code[(few.obs["lane"] == "alone").to_numpy()]
    assert (alone == -2).all()
    screen.obs["dose"] = -1.0
    options = {"covariate": {name: [0.0] for name in set(label)}, "dose_key": "dose", **FAST}
    with pytest.raises(ValueError, match=naming("'dose'", "-1.0")):
        tl.fit_perturbation(screen, start, key="target", control="control", **options)


def test_the_nearest_compound_is_the_one_with_the_highest_tanimoto_similarity():
    bits = np.array([[1, 1, 0, 0, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]], float)
    change = np.arange(6.0).reshape(3, 2)
    asked = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]], float)
    task = Task(change, [()] * 3, [()] * 2, {})
    found = baselines(task, {}, (bits, asked), are_bits=True)["nearest by Tanimoto"]
    # 2 / 3 with the first against 1 / 2 with the last; 2 / 3 with the second
    np.testing.assert_array_equal(found, change[[0, 1]])


def test_drugs_of_other_scaffolds_are_predicted_better_than_by_the_mean(start):
    """The change follows the vector of a compound; vectors of held-out compounds are new."""
    rng = np.random.default_rng(0)
    vectors = {f"drug_{i}": rng.normal(size=3) for i in range(24)}
    effects = rng.normal(0, 0.8, (3, N_GENES))

    def rates(name):
        return 6 * np.exp(vectors[name] @ effects) if name in vectors else np.full(N_GENES, 6.0)

    adata = screen_of(list(vectors), rates, n=10)
    tl.fit_perturbation(
        adata, start, key="target", control="control", covariate=vectors, held_out=0.25, epochs=15, lr=8e-3,
        batch_size=32, n_decoders=1, device="cpu",
    )  # fmt: skip
    summary = adata.uns["scllm"]["perturbation"]["summary"].set_index(["metric", "method"])["score"]
    assert summary["mse", "model"] < summary["mse", "mean"]
    assert summary["mse", "ridge on compounds"] < summary["mse", "mean"]


def test_compounds_are_held_out_by_scaffold(start):
    pytest.importorskip("rdkit")
    smiles = {
        "a": "c1ccccc1C",
        "b": "c1ccccc1O",
        "c": "C1CCCCC1C",
        "d": "C1CCCCC1O",
        "e": "c1ccncc1C",
        "f": "c1ccncc1O",
    }
    adata = screen_of(list(smiles), lambda name: np.full(N_GENES, 4.0), n=8)
    adata.obs["dose"] = np.where(adata.obs["target"] == "control", 0.0, 2.0)
    model = tl.fit_perturbation(
        adata, start, key="target", control="control", covariate=smiles, dose_key="dose", held_out=0.34, **FAST
    )
    split = adata.uns["scllm"]["perturbation"]["split"].set_index("perturbation")["held_out"]
    assert [split[a] for a in "ace"] == [split[b] for b in "bdf"]
    assert split.sum() == 2
    assert {"nearest by Tanimoto", "ridge on compounds"} <= set(adata.uns["scllm"]["perturbation"]["table"]["method"])
    tl.predict_perturbation(adata, model, genes="new", covariate={"new": "CCO"}, dose=1.0)
    assert np.isfinite(adata.layers["predicted"]).all()
    with pytest.raises(KeyError, match=naming("'other'")):
        tl.predict_perturbation(adata, model, genes="other", dose=1.0)


def test_linear_and_additive_baselines_are_exact_on_linear_data():
    rng = np.random.default_rng(0)
    place = {gene: i for i, gene in enumerate(GENES)}
    single = {gene: rng.normal(size=N_GENES) for gene in GENES[:6]}
    task = Task(
        np.array([*single.values(), single["gene_0"] + single["gene_2"]]),
        [*((gene,) for gene in single), ("gene_0", "gene_2")], [("gene_0", "gene_1"), ("gene_7",)], place,
    )  # fmt: skip
    found = baselines(task, {"table": rng.normal(size=(N_GENES, 4))})
    np.testing.assert_allclose(found["additive"][0], single["gene_0"] + single["gene_1"])
    assert np.isnan(found["additive"][1]).all()
    with_0 = task.change[[0, 6]].mean(0)
    np.testing.assert_allclose(found["matching mean"][0], (with_0 + single["gene_1"]) / 2)
    np.testing.assert_allclose(found["mean"][1], task.change.mean(0))
    assert not found["no change"].any()
    # an independent way: the penalised least squares problem solved by gradient-free normal equations
    centered = task.change - task.change.mean(0)
    _, scale, right = np.linalg.svd(centered, full_matrices=False)
    n = min(10, *centered.shape)
    genes = right[:n].T * scale[:n]
    p = np.array([sum(genes[place[g]] for g in names) for names in task.train])
    left = np.linalg.inv(genes.T @ genes + 0.1 * np.eye(n)) @ genes.T @ centered.T
    w = left @ p @ np.linalg.inv(p.T @ p + 0.1 * np.eye(n))
    expected = genes @ w @ genes[place["gene_7"]] + task.change.mean(0)
    np.testing.assert_allclose(found["linear"][1], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "values"),
    [
        ({"control": "ctrl"}, KeyError, ["'ctrl'", "'control'"]),
        ({"key": "targe"}, KeyError, ["'targe'", "'target'"]),
        ({"held_out": ["gene_99"]}, KeyError, ["'gene_99'"]),
        ({"held_out": ["unmeasured"]}, ValueError, ["'unmeasured'", "held-out"]),
        ({"held_out": 1.5}, ValueError, ["1.5"]),
        ({"batch_key": "batc"}, KeyError, ["'batc'"]),
        ({"n_decoders": 0}, ValueError, ["n_decoders", "0"]),
        ({"dose_key": "dose"}, TypeError, ["'dose'", "covariate"]),
        ({"covariate": {"gene_0": [1.0]}}, KeyError, ["covariate"]),
    ],
)
def test_bad_input_raises(screen, start, options, error, values):
    with pytest.raises(error, match=naming(*values)):
        tl.fit_perturbation(screen, start, **{"key": "target", "control": "control", **FAST, **options})
    assert "scllm" not in screen.uns


def test_too_few_perturbations_and_other_models_are_errors(screen, start, fitted):
    one = screen[screen.obs["target"].isin(["control", "gene_1"])].copy()
    with pytest.raises(ValueError, match=naming("2", "1", "'gene_1'")):
        tl.fit_perturbation(one, start, key="target", control="control")
    screen.obs["other"] = np.where(screen.obs["target"] == "control", "control", "x" + screen.obs["target"].astype(str))
    with pytest.raises(ValueError, match=naming("'xgene_0'")):
        tl.fit_perturbation(screen, start, key="other", control="control", **FAST)
    ranks = models.build("geneformer", vocab=GENES, size="tiny")
    with pytest.raises(ValueError, match=naming("scgpt", "geneformer")):
        tl.fit_perturbation(screen, ranks, key="target", control="control")
    with pytest.raises(ValueError, match="fit_perturbation"):
        tl.predict_perturbation(screen, start, genes="gene_1")
    with pytest.raises(KeyError, match=naming("'gene_99'")):
        tl.predict_perturbation(screen, fitted[1], genes="gene_99")
