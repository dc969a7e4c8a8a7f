"""Expression from histology: features, training, prediction, scores, and the comparison."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from messages import naming
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge

import scllm
from scllm import models, settings
from scllm.data.spots import spatial_blocks
from scllm.models import Plausibility
from scllm.tl._spatial_baselines import PENALTIES, mean_prediction, ridge_prediction


@pytest.fixture(scope="module")
def _sections() -> ad.AnnData:
    adata = scllm.datasets.toy_spatial(n_sections=3, side=8, n_genes=16)
    adata.uns["spatial"] = {
        name: {"images": lib["images"], "scalefactors": lib["scalefactors"]}
        for name, lib in adata.uns["spatial"].items()
    }
    return adata


@pytest.fixture
def sections(_sections) -> ad.AnnData:
    return _sections.copy()


def fit(adata, **options):
    return scllm.tl.fit_spatial(adata, **{"use_rep": "programmes", "size": "tiny", "epochs": 3, **options})


def colours(patches: torch.Tensor) -> torch.Tensor:
    return patches.float().mean((1, 2))


# --- features ---


def test_patches_are_encoded_in_the_order_of_spots(sections):
    shuffled = sections[np.random.default_rng(0).permutation(sections.n_obs)].copy()
    for adata in (sections, shuffled):
        scllm.pp.image_patches(adata, pixels=16)
        scllm.tl.embed_patches(adata, encoder=colours, batch_size=7)
    image = sections.uns["spatial"]["section1"]["images"]["hires"]
    np.testing.assert_allclose(sections.obsm["X_patch"][0], image[:16, :16].mean((0, 1)), rtol=1e-5)
    order = sections.obs_names.get_indexer(shuffled.obs_names)
    np.testing.assert_array_equal(shuffled.obsm["X_patch"], sections.obsm["X_patch"][order])


def test_finished_patches_are_kept(sections, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(settings, "cache_dir", tmp_path)
    scllm.pp.image_patches(sections, pixels=16)
    once = scllm.tl.embed_patches(sections, encoder="cnn_small", pretrained=False, copy=True).obsm["X_patch"]
    (file,) = (tmp_path / "patches").glob("*.f32")
    # as if the call had been interrupted in the middle of the row of the 101st patch
    file.write_bytes(file.read_bytes()[: 100 * 4 * once.shape[1] + 10])
    caplog.clear()
    again = scllm.tl.embed_patches(sections, encoder="cnn_small", pretrained=False, copy=True).obsm["X_patch"]
    assert "100 of 192" in caplog.text
    np.testing.assert_allclose(again, once, atol=1e-6)
    other = scllm.tl.embed_patches(sections, encoder="cnn_small", pretrained=False, random_state=1, copy=True)
    assert not np.allclose(other.obsm["X_patch"], once)


def test_a_local_folder_of_transformers_is_an_encoder(sections, tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    scllm.pp.image_patches(sections, pixels=12)
    scllm.tl.embed_patches(sections, encoder=tmp_path / "vit")
    assert sections.obsm["X_patch"].shape == (192, 8)


def test_encoders_that_cannot_be_used_are_named(sections, monkeypatch):
    with pytest.raises(KeyError, match=naming("image_patches")):
        scllm.tl.embed_patches(sections, encoder=colours)
    scllm.pp.image_patches(sections, pixels=16)
    with pytest.raises(ValueError, match=naming("'cnn_small'", "pretrained=False")):
        scllm.tl.embed_patches(sections, encoder="cnn_small")
    with pytest.raises(ValueError, match=naming("'resnet50'", "resnet18")):
        scllm.tl.embed_patches(sections, encoder="resnet50")
    with pytest.raises(ValueError, match=naming(64, "(3,)")):
        scllm.tl.embed_patches(sections, encoder=lambda patches: patches.float().mean((0, 1, 2)))


# --- training ---


def test_a_visible_programme_is_learnt(sections):
    train, test = (
        sections[sections.obs["section"] != "section3"].copy(),
        sections[sections.obs["section"] == "section3"].copy(),
    )
    fit(train, epochs=30, validation=0)
    scllm.tl.predict_spatial(test, scllm.models.load(train.uns["scllm"]["model"]["path"]))
    scores = scllm.tl.evaluate_spatial(test, predicted="predicted")
    # the programmes themselves are the features, and most of the variance is theirs
    assert scores.loc["mean", "pcc"] > 0.6
    assert test.layers["predicted"].dtype == np.float32


@pytest.mark.parametrize("likelihood", ["mse", "nb"])
def test_a_run_is_resumed_to_the_same_weights(sections, tmp_path, likelihood, monkeypatch):
    from scllm.engine import spots

    whole = fit(sections, run_dir=tmp_path / "whole", epochs=4, likelihood=likelihood)
    monkeypatch.setattr(spots, "_SECONDS", -1.0)  # a checkpoint after each epoch
    train_epoch = spots._train_epoch

    def interrupted(*arguments):
        if arguments[6] == 2:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(spots, "_train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(sections, run_dir=tmp_path / "parts", epochs=4, likelihood=likelihood)
    assert models.load(tmp_path / "parts", checkpoint="last").family == "spatial"
    resumed = fit(sections, run_dir=tmp_path / "parts", epochs=4, likelihood=likelihood)
    assert resumed.hash() == whole.hash()
    steps = resumed.history.loc[resumed.history["split"] == "train", "step"].tolist()
    assert steps == list(range(1, len(steps) + 1))
    assert models.load(tmp_path / "parts").hash() == whole.hash()
    assert fit(sections, run_dir=tmp_path / "parts", epochs=4, likelihood=likelihood).hash() == whole.hash()
    with pytest.raises(ValueError, match=naming("train.lr", 0.5)):
        fit(sections, run_dir=tmp_path / "parts", epochs=4, likelihood=likelihood, lr=0.5)


def test_training_repeats_and_leaves_global_random_states(sections):
    lm = models.build("gpt2", vocab=sections.var_names, size="tiny")
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    hashes = {
        fit(sections, lm=lm, plausibility=kind, random_state=seed).hash() for seed in (0, 1) for kind in ("nll", "nll")
    }
    assert len(hashes) == 2
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002


def test_the_weight_is_the_ratio_of_gradients(sections):
    from scllm.engine.spots import Term

    predicted = torch.randn(5, 4, requires_grad=True)
    term = Term(torch.nn.Identity(), 0.3)
    main, extra = (predicted**2).sum(), 7 * predicted.exp().sum()
    term.scale(main, extra, predicted)
    norms = [
        torch.autograd.grad(loss, predicted)[0].norm()
        for loss in (main, term.factor * 7 * predicted.exp().sum())
        if loss.requires_grad
    ]
    assert norms[1] / norms[0] == pytest.approx(0.3, rel=1e-5)


def test_a_term_without_weight_changes_nothing(sections):
    lm = models.build("gpt2", vocab=sections.var_names, size="tiny")
    assert fit(sections, lm=lm, weight=0.0).hash() == fit(sections).hash()
    history = fit(sections, lm=lm, weight=0.5).history
    assert {"loss", "mse", "plausibility", "plausibility_factor"} <= set(history)
    assert history["loss"].notna().all()


def test_any_module_can_be_the_term(sections):
    class Shrink(torch.nn.Module):
        def forward(self, predicted, truth):
            return (predicted**2).mean(1)

    small = fit(sections, lm=Shrink(), weight=20.0, lr=0.05, epochs=10)
    scllm.tl.predict_spatial(sections, small, key_added="small")
    scllm.tl.predict_spatial(sections, fit(sections, lr=0.05, epochs=10), key_added="plain")
    assert np.abs(sections.layers["small"]).mean() < 0.8 * np.abs(sections.layers["plain"]).mean()


def test_a_ready_term_with_other_settings_is_another_run(sections, tmp_path):
    lm = models.build("gpt2", vocab=list(sections.var_names), size="tiny")

    def term(**options):
        return Plausibility(lm, genes=list(sections.var_names), **options)

    nll = fit(sections, lm=term(kind="nll"), run_dir=tmp_path)
    assert sections.uns["scllm"]["fit_spatial"]["params"]["plausibility"] == "nll"
    assert fit(sections, lm=term(kind="nll", tau=0.5), run_dir=tmp_path).hash() == nll.hash()
    for options in ({"kind": "match"}, {"kind": "nll", "top_k": 4}, {"kind": "nll", "random_state": 1}):
        with pytest.raises(ValueError, match=naming("lm")):
            fit(sections, lm=term(**options), run_dir=tmp_path)


def test_a_network_is_trained_on_pixels(sections, tmp_path):
    scllm.pp.image_patches(sections, pixels=16)
    model = fit(sections, use_rep=None, epochs=1, n_neighbors=2, batch_size=64)
    scllm.tl.predict_spatial(sections, model)
    first = sections.layers["predicted"].copy()
    model.save(tmp_path / "model")
    scllm.tl.predict_spatial(sections, tmp_path / "model", batch_size=50)
    np.testing.assert_allclose(sections.layers["predicted"], first, atol=1e-5)


def test_predictions_do_not_depend_on_order_or_genes_beside(sections):
    model = fit(sections, genes=["gene3", "gene1"])
    scllm.tl.predict_spatial(sections, model)
    predicted = sections.layers["predicted"]
    assert np.isnan(predicted[:, 0]).all()
    assert np.isfinite(predicted[:, [1, 3]]).all()
    other = sections[::-1, ["gene1", "gene5", "gene3"]].copy()
    scllm.tl.predict_spatial(other, model)
    np.testing.assert_allclose(other.layers["predicted"][::-1, [0, 2]], predicted[:, [1, 3]], atol=1e-6)


def test_everything_written_can_be_stored(sections, tmp_path):
    scllm.pp.spatially_variable(sections, n_top_genes=8)
    scllm.pp.image_patches(sections, pixels=16)
    scllm.tl.embed_patches(sections, encoder=colours)
    fit(sections, group_key="section", validation=0.4)
    scllm.tl.predict_spatial(sections)
    scllm.tl.evaluate_spatial(sections, predicted="predicted")
    sections.write_h5ad(tmp_path / "a.h5ad")
    sections.write_zarr(tmp_path / "a.zarr")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    scllm.tl.predict_spatial(again, key_added="again")
    np.testing.assert_allclose(again.layers["again"], sections.layers["predicted"], atol=1e-6)
    assert json.loads((scllm.models.load(again.uns["scllm"]["model"]["path"]).path / "config.json").read_text())


def test_bad_input_of_training_is_named(sections):
    with pytest.raises(KeyError, match=naming("X_patch", "embed_patches")):
        scllm.tl.fit_spatial(sections)
    with pytest.raises(ValueError, match=naming("weight=-1")):
        fit(sections, weight=-1)
    with pytest.raises(ValueError, match=naming("'CD3D'", "var_names")):
        fit(sections, genes=["CD3D"])
    with pytest.raises(ValueError, match=naming("none", "genes=")):
        fit(sections, genes=[])
    with pytest.raises(ValueError, match=naming("'features'", "'feature'")):
        fit(sections, plausibility="features")
    with pytest.raises(ValueError, match=naming("'gpt2'", "scllm.tl.pretrain")):
        fit(sections, lm="gpt2")
    assert fit(sections, genes="gene5").vocab.genes == ("gene5",)
    sections.layers["logged"] = sections.X.log1p()
    with pytest.raises(ValueError, match=naming("'nb'", "layer=")):
        fit(sections, likelihood="nb", layer="logged")
    sections.X.data[3] = -1
    with pytest.raises(ValueError, match=naming("negative")):
        fit(sections)


def test_bad_input_of_prediction_is_named(sections):
    model = fit(sections)
    with pytest.raises(ValueError, match=naming(16, 1, "('gene0')")):
        scllm.tl.predict_spatial(sections[:, 1:].copy(), model)
    other = sections.copy()
    del other.obsm["programmes"]
    with pytest.raises(KeyError, match=naming("embed_patches(adata, key_added='programmes')")) as error:
        scllm.tl.predict_spatial(other, model)
    assert "use_rep" not in str(error.value)
    other = sections.copy()
    other.obsm["programmes"] = other.obsm["programmes"][:, :3]
    with pytest.raises(ValueError, match=naming(8, 3, "encoder")):
        scllm.tl.predict_spatial(other, model)
    with pytest.raises(ValueError, match=naming("gpt2", "fit_spatial")):
        scllm.tl.predict_spatial(sections, models.build("gpt2", vocab=sections.var_names, size="tiny"))
    with pytest.raises(ValueError, match=naming("spatial", "predict_spatial")):
        scllm.tl.embed(sections, model)
    with pytest.raises(ValueError, match=naming("tl.fit_spatial")):
        scllm.tl.pretrain(sections, "spatial")


# --- scores ---


def test_scores_are_within_sections_and_those_of_scipy(sections):
    rng = np.random.default_rng(0)
    scale = 1e4 / sections.X.sum(1)
    truth = np.log1p(sections.X.multiply(scale).toarray())
    shift = 5 * sections.obs["section"].cat.codes.to_numpy()[:, None]
    sections.layers["guess"] = (truth + rng.normal(size=truth.shape) + shift).astype(np.float32)
    sections.layers["truth"] = truth.astype(np.float32)
    scores = scllm.tl.evaluate_spatial(sections, predicted="guess")
    for name in ("section1", "section3"):
        rows = (sections.obs["section"] == name).to_numpy()
        t, p = truth[rows], sections.layers["guess"][rows].astype(float)
        assert scores.loc[name, "pcc"] == pytest.approx(
            np.mean([pearsonr(t[:, g], p[:, g])[0] for g in range(16)]), rel=1e-4
        )
        assert scores.loc[name, "spearman"] == pytest.approx(
            np.mean([spearmanr(t[:, g], p[:, g])[0] for g in range(16)]), rel=1e-4
        )
        assert scores.loc[name, "mse"] == pytest.approx(((t - p) ** 2).mean(), rel=1e-4)
        off = ~np.eye(16, dtype=bool)
        difference = (np.corrcoef(t.T) - np.corrcoef(p.T))[off]
        assert scores.loc[name, "correlation_error"] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-4)
        assert scores.loc[name, "variance_ratio"] == pytest.approx(np.median(p.var(0) / t.var(0)), rel=1e-4)
    np.testing.assert_allclose(scores.loc["mean"], scores.iloc[:3].mean())
    same = scllm.tl.evaluate_spatial(sections, predicted="guess", truth="truth", group_key="section")
    np.testing.assert_allclose(same, scores, rtol=1e-4)
    table = sections.uns["scllm"]["spatial"]["table"]
    assert len(table) == 3 * 16


def test_constant_genes_are_left_out_and_counted(sections):
    sections.layers["truth"] = sections.X.multiply(np.arange(16) >= 3).tocsr().log1p()
    sections.layers["guess"] = np.ones(sections.shape, np.float32)
    scores = scllm.tl.evaluate_spatial(sections, predicted="guess", truth="truth")
    assert scores["n_constant"].tolist() == [3] * 4
    assert scores["n_genes"].tolist() == [13] * 4
    assert scores["n_constant_predicted"].tolist() == [13] * 4
    assert (scores["pcc"] == 0).all()
    assert (scores["variance_ratio"] == 0).all()
    # with 0 for constant genes, the mean profile would have the best scores of all
    assert scores[["correlation_error", "morans_i_error"]].isna().all(axis=None)


def test_genes_predicted_as_constant_are_left_out_of_scores_of_structure(sections):
    rng = np.random.default_rng(0)
    sections.layers["truth"] = sections.X.log1p()
    truth = sections.layers["truth"].toarray()
    sections.layers["guess"] = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    varying = scllm.tl.evaluate_spatial(
        sections, predicted="guess", truth="truth", genes=[f"gene{i}" for i in range(3, 16)]
    )
    sections.layers["guess"][:, :3] = truth[:, :3].mean(0)
    scores = scllm.tl.evaluate_spatial(sections, predicted="guess", truth="truth")
    assert scores["n_constant_predicted"].tolist() == [3] * 4
    for name in ("correlation_error", "morans_i_error"):
        np.testing.assert_allclose(scores[name], varying[name])
    # a gene that is not predicted at all counts as a failure
    np.testing.assert_allclose(scores["pcc"], varying["pcc"] * 13 / 16)


def test_pathways_and_language_models_add_scores(sections):
    lm = models.build("gpt2", vocab=sections.var_names, size="tiny")
    sections.layers["guess"] = np.asarray(sections.X.toarray(), np.float32)
    sections.layers["truth"] = sections.X.log1p()
    sections.layers["guess"][:] = sections.layers["truth"].toarray()
    scores = scllm.tl.evaluate_spatial(
        sections, predicted="guess", truth="truth", lm=lm, gene_sets={"a": ["gene0", "gene8"], "b": ["CD3D"]}
    )
    assert scores["pathway_pcc"].tolist() == pytest.approx([1.0] * 4)
    assert scores["auroc_real"].tolist() == [0.5] * 4
    assert scores["nats_truth"].tolist() == scores["nats_predicted"].tolist()
    with pytest.raises(ValueError, match=naming("'b'", 2)):
        scllm.tl.evaluate_spatial(sections, predicted="guess", gene_sets={"b": ["CD3D"]})


def test_measured_and_predicted_spots_are_told_apart_at_the_same_number_of_genes(sections):
    lm = models.build("gpt2", vocab=sections.var_names, size="tiny")
    # spots that express half of the genes, and predictions in the same order in which no gene is 0
    truth = np.log1p(sections.X.toarray()) + 1e-3 * np.arange(16)
    truth[truth < np.median(truth, axis=1, keepdims=True)] = 0
    filled = np.random.default_rng(0).uniform(1e-4, 2e-4, truth.shape)
    sections.layers["truth"] = truth.astype(np.float32)
    sections.layers["guess"] = np.where(truth > 0, truth, filled).astype(np.float32)
    scores = scllm.tl.evaluate_spatial(sections, predicted="guess", truth="truth", lm=lm)
    np.testing.assert_allclose(scores["nats_predicted"], scores["nats_truth"], rtol=1e-6)
    assert scores["auroc_real"].tolist() == [0.5] * 4


# --- baselines and the comparison ---


def test_the_penalty_is_chosen_within_the_training_spots():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(90, 60)), np.zeros((60, 5))
    weights[:3] = rng.normal(size=(3, 5))
    y = x @ weights + 3 * rng.normal(size=(90, 5))
    fold = np.repeat([0, 1, 2], 30)
    new = rng.normal(size=(400, 60))
    guess, penalty = ridge_prediction(x, y, fold, new)
    assert PENALTIES[0] < penalty < PENALTIES[-1]
    error = ((guess - new @ weights) ** 2).mean()
    small = Ridge(alpha=0.008).fit(x, y).predict(new)
    assert error < 0.6 * ((small - new @ weights) ** 2).mean()
    assert (mean_prediction(y, 2) == y.mean(0)).all()


def test_the_comparison_has_a_row_for_each_arm(sections, tmp_path):
    options = {"use_rep": "programmes", "n_seeds": 1, "epochs": 2, "size": "tiny", "lm_epochs": 1, "n_resamples": 20}
    kinds = ["none", "gaussian", "random", "permuted", "feature"]
    small = sections[sections.obs["section"] != "section3"].copy()
    table = scllm.tl.ablate_spatial(small, lm="gpt2", kinds=kinds, **options)
    assert table["arm"].tolist() == ["mean", "ridge", "knn", *kinds]
    rows = table.set_index("arm")
    assert rows["n_fits"].tolist() == [2] * 8
    assert rows.loc["mean", "pcc"] == 0
    assert np.isnan(rows.loc["none", "pcc_difference"])
    compared = rows.drop(index="none")
    np.testing.assert_allclose(compared["pcc_difference"], compared["pcc"] - rows.loc["none", "pcc"], atol=1e-6)
    assert (compared["pcc_low"] <= compared["pcc_high"]).all()
    assert len(small.uns["scllm"]["ablate_spatial"]["fits"]) == 16
    assert np.isnan(rows.loc["mean", "correlation_error"])
    assert rows["auroc_real"].between(0, 1).all()
    small.write_h5ad(tmp_path / "a.h5ad")


def test_a_comparison_goes_on_with_what_is_trained(sections, tmp_path, monkeypatch):
    from scllm.tl import _spatial_fold

    options = {
        "use_rep": "programmes",
        "n_seeds": 1,
        "epochs": 2,
        "size": "tiny",
        "n_resamples": 5,
        "run_dir": tmp_path / "runs",
        "n_top_genes": 8,
        "n_train_groups": [1],
    }
    first = scllm.tl.ablate_spatial(sections, lm="gpt2", kinds=["none"], **options)
    trained = []

    def counted(adata, **arguments):
        trained.append(arguments["genes"])
        return scllm.tl.fit_spatial(adata, **arguments)

    monkeypatch.setattr(_spatial_fold, "fit_spatial", counted)
    folder = tmp_path / "runs"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("last.*")}
    second = scllm.tl.ablate_spatial(sections, lm="gpt2", kinds=["none", "gaussian"], **options)
    assert before
    assert {path: path.stat().st_mtime_ns for path in before} == before
    pd.testing.assert_frame_equal(
        second[second["arm"] == "none"][first.columns].reset_index(drop=True),
        first[first["arm"] == "none"].reset_index(drop=True),
    )
    # genes of each fold are the spatially variable ones of its training section
    for name, genes in zip(["section2", "section3", "section1"], trained[::2], strict=True):
        part = sections[sections.obs["section"] == name].copy()
        scllm.pp.spatially_variable(part, n_top_genes=8)
        assert sorted(genes) == sorted(part.var_names[part.var["spatially_variable"]])


def test_predictors_that_read_pixels_are_compared(sections):
    scllm.pp.image_patches(sections, pixels=16)
    table = scllm.tl.ablate_spatial(
        sections,
        lm="gpt2",
        kinds=["none", "gaussian"],
        use_rep=None,
        n_neighbors=0,
        n_seeds=1,
        epochs=1,
        size="tiny",
        n_resamples=3,
        n_train_groups=1,
    )
    assert table["arm"].tolist() == ["mean", "none", "gaussian"]
    assert table["pcc"].notna().all()


def test_a_language_model_of_held_out_groups_is_an_error(sections):
    unknown = scllm.tl.pretrain(sections, "gpt2", size="tiny", epochs=1, batch_size=192, validation=0)
    sections.obs["donor"] = sections.obs["section"]
    lm = scllm.tl.pretrain(sections, "gpt2", size="tiny", epochs=1, batch_size=192, validation=0)
    options = {
        "use_rep": "programmes",
        "kinds": ["none"],
        "n_seeds": 1,
        "epochs": 1,
        "n_resamples": 0,
        "group_key": "donor",
    }
    for trained in (lm, unknown):
        with pytest.raises(ValueError, match=naming("'section1'", "'section3'", "allow_overlap")):
            scllm.tl.ablate_spatial(sections, lm=trained, **options)
        with pytest.raises(ValueError, match=naming("allow_overlap=['section2']")):
            scllm.tl.ablate_spatial(sections, lm=trained, allow_overlap=["section1", "section3"], **options)
    # two sections of a donor: the model was trained on one of them, and the other is of the same person
    sections.obs["donor"] = sections.obs["section"].map({"section1": "a", "section2": "a", "section3": "b"})
    part = sections[sections.obs["section"] == "section1"].copy()
    of_one = scllm.tl.pretrain(part, "gpt2", size="tiny", epochs=1, batch_size=64, validation=0)
    with pytest.raises(ValueError, match=naming("allow_overlap=['section1', 'section2']")):
        scllm.tl.ablate_spatial(sections, lm=of_one, **{**options, "group_key": "section"})
    sections.obs["donor"] = sections.obs["section"]
    table = scllm.tl.ablate_spatial(
        sections, lm=lm, allow_overlap=["section1", "section2", "section3"], size="tiny", **options
    )
    assert table["arm"].tolist() == ["mean", "ridge", "knn", "none"]


def test_bad_input_of_the_comparison_is_named(sections):
    with pytest.raises(ValueError, match=naming("'none'", "features")):
        scllm.tl.ablate_spatial(sections, lm="gpt2", kinds=["features"])
    with pytest.raises(ValueError, match=naming(3, "[3]")):
        scllm.tl.ablate_spatial(sections, lm="gpt2", n_train_groups=3)
    with pytest.raises(ValueError, match=naming("'masked'", "gpt2", "scgpt")):
        scllm.tl.ablate_spatial(sections, lm="gpt2", kinds=["none", "masked"])
    with pytest.raises(KeyError, match=naming("X_patch", "embed_patches")):
        scllm.tl.ablate_spatial(sections, lm="gpt2")
    with pytest.raises(KeyError, match=naming("patient")):
        scllm.tl.ablate_spatial(sections, lm="gpt2", group_key="patient")


def test_inner_folds_with_one_section_are_blocks():
    xy = np.argwhere(np.ones((8, 8))).astype(float)
    block = spatial_blocks(xy, 4)
    assert pd.Series(block).value_counts().tolist() == [16] * 4
    assert all(np.ptp(xy[block == one], axis=0).max() <= 7 for one in range(4))


def test_real_spots_are_told_from_shuffled_ones():
    """Planted data: programmes of eight genes each, whose order a language model learns."""
    from models.sentences import built, sentences, train

    rng = np.random.default_rng(0)

    def profiles(n):
        return (
            np.repeat(rng.normal(size=(n, 3)), 8, axis=1)
            + np.tile(np.linspace(0, 1, 8), 3)
            + 0.05 * rng.normal(size=(n, 24))
            + 9
        ).astype(np.float32)

    lm = built("gpt2")
    train(lm, lambda step: sentences(lm, np.argsort(-profiles(32), axis=1)), steps=80, lr=5e-3)
    real = profiles(100)
    shuffled = rng.permuted(real, axis=1)
    term = Plausibility(lm.eval(), kind="nll")
    with torch.no_grad():
        score = -torch.cat([term(torch.from_numpy(real)), term(torch.from_numpy(shuffled))]).numpy()
    from sklearn.metrics import roc_auc_score

    assert roc_auc_score(np.repeat([1, 0], 100), score) >= 0.95


@pytest.mark.parametrize("verb", ["embed", "finetune", "perturb", "reconstruct"])
def test_a_spatial_model_is_refused_where_expression_is_read(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(scllm.settings, "run_dir", tmp_path / "runs")
    cells = scllm.datasets.toy(n_cells=30)
    model = scllm.models.build("spatial", vocab=cells.var_names, size="tiny")
    options = {"finetune": {"key": "cell_type"}, "perturb": {"genes": ["gene0"]}}.get(verb, {})
    with pytest.raises(ValueError, match=naming("spatial", "image features", "tl.predict_spatial")):
        getattr(scllm.tl, verb)(cells, model, **options)
    assert not (tmp_path / "runs").exists()
