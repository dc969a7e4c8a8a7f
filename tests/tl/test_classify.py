"""Labels and values from a model with heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from messages import naming

from scllm._results import classes_of
from scllm.data.genes import match
from scllm.models.base import Batch, HeadSpec
from scllm.tl import classify


@pytest.fixture
def labelled(adata, tiny):
    """A model with an untrained head, which predicts each of three labels for some of the cells."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tiny.set_heads([HeadSpec("cell_type", ("A", "B", "C"))])
    out = tiny.eval().heads[0].out
    out.weight.data *= 20
    out.bias.data -= torch.from_numpy(outputs_slowly(adata, tiny)["cell_type"].mean(0))
    return tiny


@pytest.fixture
def several(tiny):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tiny.set_heads([HeadSpec("kind", ("x/y", "b")), HeadSpec("depth", None, mean=100.0, std=10.0)])
    return tiny.eval()


@torch.no_grad()
def outputs_slowly(adata, model) -> dict[str, np.ndarray]:
    """Compute the output of each head for each cell, one cell at a time."""
    genes = match(adata.var_names, model.vocab)
    tokens = model.encoder(genes.tokens(adata.X), model.vocab, measured=genes.measured)
    found = [model(Batch.from_tokens(tokens.take(np.array([cell])))).heads for cell in range(adata.n_obs)]
    return {spec.key: torch.cat([heads[spec.key] for heads in found]).numpy() for spec in model.head_specs}


def test_the_most_probable_label_and_all_probabilities_are_written(adata, labelled):
    classify(adata, labelled)
    logits = outputs_slowly(adata, labelled)["cell_type"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = adata.obsm["scllm_label_probabilities"]
    assert probabilities.dtype == adata.obs["scllm_label_prob"].dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_array_equal(adata.obs["scllm_label_prob"], probabilities.max(1))
    assert adata.obs["scllm_label"].nunique() == 3
    assert adata.obs["scllm_label"].tolist() == np.array(["A", "B", "C"])[expected.argmax(1)].tolist()
    assert list(adata.uns["scllm"]["classify"]["classes"]) == ["A", "B", "C"]
    assert adata.obs["scllm_label"].cat.categories.tolist() == ["A", "B", "C"]


def test_labels_that_the_model_cannot_predict_cause_a_warning(adata, labelled):
    adata.obs["cell_type"] = ["A", "ductal", "ductal", *["B"] * 56, None]
    with pytest.warns(UserWarning, match=naming(2, 60, "first: 'ductal'", "'A', 'B', 'C'")):
        classify(adata, labelled)


def test_uncertain_cells_are_unknown(adata, labelled):
    classify(adata, labelled, key_added="sure")
    threshold = float(adata.obs["sure_prob"].median())
    classify(adata, labelled, threshold=threshold)
    doubtful = (adata.obs["scllm_label_prob"] < threshold).to_numpy()
    assert 20 < doubtful.sum() < 40
    assert (adata.obs["scllm_label"][doubtful] == "unknown").all()
    assert adata.obs["scllm_label"][~doubtful].tolist() == adata.obs["sure"][~doubtful].tolist()
    assert adata.obsm["scllm_label_probabilities"].shape == (60, 3)
    assert list(adata.uns["scllm"]["classify"]["classes"]) == ["A", "B", "C"]
    with pytest.raises(ValueError, match=naming("threshold", "1.5", "probability")):
        classify(adata, labelled, threshold=1.5)


def test_a_class_called_unknown_causes_a_warning(adata, labelled):
    labelled.set_heads([HeadSpec("cell_type", ("A", "B", "unknown"))])
    classify(adata, labelled)
    with pytest.warns(UserWarning, match=naming("'unknown'", "'cell_type'", "threshold=")):
        classify(adata, labelled, threshold=0.9)


def test_classes_of_earlier_columns_stay_known(adata, labelled):
    classify(adata, labelled, key_added="sure", threshold=0.6)
    classify(adata, labelled, key_added="all")
    cut = adata[adata.obs["sure"] != "A"].copy()  # removes a category; "unknown" is no class
    assert [classes_of(cut, name) for name in ("sure", "all", "none")] == [["A", "B", "C"], ["A", "B", "C"], []]
    labelled.set_heads([HeadSpec("kind", ("x", "y"))])
    classify(adata, labelled, key_added="sure")
    assert [classes_of(adata, name) for name in ("sure", "all")] == [["x", "y"], ["A", "B", "C"]]


def test_a_threshold_is_for_labels(adata, tiny):
    tiny.set_heads([HeadSpec("depth", None, mean=100.0, std=10.0)])
    with pytest.raises(TypeError, match=naming("threshold=0.5", "'depth'", "values")):
        classify(adata, tiny, threshold=0.5)
    assert "scllm_label" not in adata.obs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 7.0}, naming("batch_size", "whole number", "7.0")),
        ({"batch_size": 0}, naming("batch_size", "whole number", "0")),
        ({"key_added": None}, naming("key_added", None)),
        ({"key_added": 3}, naming("key_added", 3)),
    ],
)
def test_invalid_settings_write_nothing(adata, labelled, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classify(adata, labelled, **options)
    assert "scllm_label" not in adata.obs


def test_several_heads_append_their_key_and_values_have_no_probability(adata, several):
    classify(adata, several, key_added="mine")
    assert set(adata.obs) - {"cell_type", "batch"} == {"mine_kind", "mine_kind_prob", "mine_depth"}
    assert list(adata.obsm) == ["mine_kind_probabilities"]
    assert adata.obs["mine_depth"].dtype == np.float32
    expected = outputs_slowly(adata, several)["depth"][:, 0] * 10 + 100
    np.testing.assert_allclose(adata.obs["mine_depth"], expected, rtol=1e-5)
    entry = adata.uns["scllm"]["classify"]
    assert list(entry["classes_kind"]) == ["x/y", "b"]
    assert set(entry) == {"params", "classes_kind"}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_does_not_matter(adata, labelled, batch_size):
    classify(adata, labelled)
    classify(adata, labelled, batch_size=batch_size, key_added="again")
    np.testing.assert_allclose(adata.obsm["again_probabilities"], adata.obsm["scllm_label_probabilities"], atol=1e-5)


def test_a_layer_is_read_and_a_copy_leaves_the_original_unchanged(adata, labelled):
    expected = classify(adata, labelled, copy=True).obsm["scllm_label_probabilities"]
    assert "scllm_label" not in adata.obs
    assert not adata.uns
    adata.layers["counts"], adata.X = adata.X, adata.X[:, ::-1]
    classify(adata, labelled, layer="counts")
    np.testing.assert_array_equal(adata.obsm["scllm_label_probabilities"], expected)


def test_a_model_without_a_head_is_an_error(adata, tiny):
    with pytest.raises(ValueError, match=naming("scgpt", "head", "tl.finetune")):
        classify(adata, tiny)
    assert not adata.uns


def test_predicted_values_remove_probabilities_of_earlier_labels(adata, labelled):
    classify(adata, labelled)
    assert "scllm_label_probabilities" in adata.obsm
    labelled.set_heads([HeadSpec("depth", None)])
    classify(adata, labelled)
    assert adata.obs["scllm_label"].dtype == np.float32
    assert "scllm_label_prob" not in adata.obs
    assert "scllm_label_probabilities" not in adata.obsm


def test_heads_on_genes_are_ignored(adata, tiny):
    tiny.set_heads([HeadSpec("kind", ("x", "y"), level="gene"), HeadSpec("cell_type", ("A", "B"))])
    classify(adata, tiny.eval())
    assert set(adata.obs) - {"cell_type", "batch"} == {"scllm_label", "scllm_label_prob"}
    assert adata.obsm["scllm_label_probabilities"].shape == (60, 2)
