"""Transferred labels, compared with a slow implementation."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from messages import naming

from scllm.models import build
from scllm.tl import embed, transfer_labels


@pytest.fixture
def reference() -> AnnData:
    rng = np.random.default_rng(0)
    labels = pd.Categorical(np.repeat(["T", "B", "CD4+/x"], 20), categories=["unused", "T", "B", "CD4+/x"])
    where = rng.normal(size=(60, 4)) + 2.0 * np.repeat(np.eye(3, 4), 20, axis=0)
    return AnnData(obs=pd.DataFrame({"kind": labels}, index=[f"r{i}" for i in range(60)]), obsm={"X_scllm": where})


@pytest.fixture
def query() -> AnnData:
    where = np.random.default_rng(1).normal(size=(25, 4)) + 1
    return AnnData(obs=pd.DataFrame(index=[f"q{i}" for i in range(25)]), obsm={"X_scllm": where})


def shares_slowly(query, reference, labels, k) -> pd.DataFrame:
    rows = []
    for cell in query:
        distance = np.linalg.norm(reference - cell, axis=1)
        nearest = np.argsort(distance)[:k]
        votes = pd.Series(1 / distance[nearest]).groupby(np.asarray(labels)[nearest]).sum()
        rows.append(votes / votes.sum())
    return pd.DataFrame(rows).fillna(0)


@pytest.mark.parametrize("n_neighbors", [1, 10])
def test_labels_are_distance_weighted_votes_of_the_nearest_neighbours(query, reference, n_neighbors) -> None:
    transfer_labels(query, reference, key="kind", n_neighbors=n_neighbors)
    labels = reference.obs["kind"].astype(str)
    expected = shares_slowly(query.obsm["X_scllm"], reference.obsm["X_scllm"], labels, n_neighbors)
    found = query.obsm["kind_transferred_probabilities"]
    assert list(query.uns["scllm"]["transfer_labels"]["classes"]) == ["T", "B", "CD4+/x"]
    np.testing.assert_allclose(found, expected[["T", "B", "CD4+/x"]], atol=1e-6)
    assert query.obs["kind_transferred"].astype(str).tolist() == expected.idxmax(axis=1).tolist()
    np.testing.assert_allclose(query.obs["kind_transferred_prob"], expected.max(axis=1), atol=1e-6)
    assert query.obs["kind_transferred_prob"].dtype == found.dtype == np.float32


def test_cells_of_the_reference_without_a_label_do_not_vote(query, reference) -> None:
    reference.obs.iloc[::3, 0] = np.nan
    known = reference[reference.obs["kind"].notna()].copy()
    other = transfer_labels(query, known, key="kind", copy=True)
    transfer_labels(query, reference, key="kind")
    # categories that no cell has come back too, and a subset has lost them
    pd.testing.assert_frame_equal(query.obs, other.obs, check_categorical=False)


def test_a_copy_with_another_name_leaves_the_original_unchanged(query, reference) -> None:
    copied = transfer_labels(query, reference, key="kind", key_added="mine", copy=True)
    assert {"mine", "mine_prob"} == set(copied.obs)
    assert "mine_probabilities" in copied.obsm
    assert not set(query.obs)
    assert not query.uns
    assert not reference.uns


def test_results_survive_writing_and_reading(query, reference, tmp_path) -> None:
    transfer_labels(query, reference, key="kind")
    query.write_h5ad(tmp_path / "q.h5ad")
    query.write_zarr(tmp_path / "q.zarr")
    for back in (ad.read_h5ad(tmp_path / "q.h5ad"), ad.read_zarr(tmp_path / "q.zarr")):
        pd.testing.assert_frame_equal(back.obs, query.obs)
        assert list(back.uns["scllm"]["transfer_labels"]["classes"]) == ["T", "B", "CD4+/x"]


def test_simulated_types_are_transferred_to_another_batch(adata, tiny) -> None:
    embed(adata, tiny)
    reference, query = (adata[adata.obs["batch"] == name].copy() for name in ("first", "second"))
    transfer_labels(query, reference, key="cell_type", n_neighbors=5)  # no warning: one model
    assert (query.obs["cell_type_transferred"] == query.obs["cell_type"]).mean() > 0.6


def test_embeddings_of_two_models_cause_a_warning(adata, tiny, tmp_path) -> None:
    other = build("scgpt", vocab=tiny.vocab, size="tiny", d_model=16, n_heads=4)
    reference, query = adata[:30].copy(), adata[30:].copy()
    embed(query, tiny)
    embed(reference, other)
    for data in (query, reference):
        embed(data, tiny, key_added="X_again")  # the model used last is the same for both
    reference.write_h5ad(tmp_path / "reference.h5ad")
    for known in (reference, ad.read_h5ad(tmp_path / "reference.h5ad")):
        with pytest.warns(UserWarning, match=rf"{tiny.hash()} in adata\b.*\b{other.hash()} in the reference"):
            transfer_labels(query, known, key="cell_type")
        transfer_labels(query, known, key="cell_type", use_rep="X_again")


def test_another_model_used_after_embedding_causes_no_warning(adata, tiny) -> None:
    reference, query = adata[:30].copy(), adata[30:].copy()
    for data in (query, reference):
        embed(data, tiny)
    embed(query, build("scgpt", vocab=tiny.vocab, size="tiny"), key_added="X_other")
    transfer_labels(query, reference, key="cell_type")  # warnings are errors here
    assert set(query.obs["cell_type_transferred"]) <= set(reference.obs["cell_type"])


@pytest.mark.parametrize("fpr", [None, 0.2])
def test_cells_far_from_the_reference_are_unknown(query, reference, fpr, tmp_path) -> None:
    query.obsm["X_scllm"][:5] += 9
    known, new = reference.obsm["X_scllm"], query.obsm["X_scllm"]
    transfer_labels(query, reference, key="kind", n_neighbors=4)
    certain = query.obs["kind_transferred"].astype(str)
    transfer_labels(query, reference, key="kind", n_neighbors=4, unknown="distance", fpr=fpr)
    far = np.sort(np.linalg.norm(new[:, None] - known, axis=2), axis=1)[:, 3]
    within = np.sort(np.linalg.norm(known[:, None] - known, axis=2), axis=1)[:, 4]  # the first is the cell itself
    threshold = np.sort(within)[int(np.ceil(61 * (1 - (fpr or 0.05)))) - 1]
    assert 5 <= (far > threshold).sum() < 25
    found = query.obs["kind_transferred"]
    assert found.tolist() == np.where(far > threshold, "unknown", certain).tolist()
    np.testing.assert_allclose(query.obs["kind_transferred_distance"], far, rtol=1e-6)
    [row] = query.uns["scllm"]["transfer_labels"]["table"].to_dict("records")
    assert (row["column"], row["n_unknown"]) == ("kind_transferred", (far > threshold).sum())
    assert row["threshold"] == pytest.approx(threshold)
    query.write_h5ad(tmp_path / "q.h5ad")
    transfer_labels(query, reference, key="kind")
    assert "kind_transferred_distance" not in query.obs


def test_a_threshold_is_the_largest_distance(query, reference) -> None:
    reference.obs["kind"] = reference.obs["kind"].cat.codes.astype("category")
    transfer_labels(query, reference, key="kind", n_neighbors=2, unknown="distance", threshold=1.5)
    assert (query.obs["kind_transferred"].isna() == (query.obs["kind_transferred_distance"] > 1.5)).all()
    assert 0 < query.obs["kind_transferred"].isna().sum() < 25


BAD = {
    "a rate alone": ({"fpr": 0.1}, TypeError, "fpr=0.1 needs unknown="),
    "a threshold alone": ({"threshold": 0.1}, TypeError, "threshold=0.1 needs unknown='distance'"),
    "another score": ({"unknown": "probability"}, ValueError, r"unknown .*'distance'.* got 'probability'"),
    "no cell left": ({"unknown": "distance", "n_neighbors": 60}, ValueError, "n_neighbors .* from 1 to 59, got 60"),
    "no embedding": (
        {"use_rep": "X_scvi"},
        KeyError,
        r"'X_scvi' is not in reference\.obsm.*embed\(reference, model",
    ),
    "no column": ({"key": "kinds"}, KeyError, r"'kinds' is not a column of reference\.obs\. Did you mean 'kind'"),
    "one class": ({"key": "one"}, ValueError, r"2 classes in obs\['one'\], got 1 "),
    "numbers": ({"key": "n"}, ValueError, r"obs\['n'\].* numbers .*astype\('category'\)"),
    "too many neighbours": (
        {"n_neighbors": 61},
        ValueError,
        r"n_neighbors .* from 1 to 60, got 61: .* 60 cells with a label",
    ),
    "no neighbours": ({"n_neighbors": 0}, ValueError, "n_neighbors .* from 1 to 60, got 0"),
    "half a neighbour": ({"n_neighbors": 2.5}, ValueError, r"n_neighbors .* from 1 to 60, got 2\.5"),
    "neighbours in words": ({"n_neighbors": "3"}, ValueError, "n_neighbors .* from 1 to 60, got '3'"),
    "other width": ({"use_rep": "wide"}, ValueError, r"obsm\['wide'\].*\b3 in adata\b.*\b5 in the reference"),
    "gaps": ({"use_rep": "gaps"}, ValueError, r"obsm\['gaps'\].* 1 of 25 cells .*first: 'q0'"),
}


@pytest.mark.parametrize("name", BAD)
def test_requests_that_cannot_be_met_write_nothing(query, reference, name) -> None:
    options, error, message = BAD[name]
    reference.obs["one"], reference.obs["n"] = "x", np.arange(60)
    reference.obsm["wide"], query.obsm["wide"] = np.ones((60, 5)), np.ones((25, 3))
    reference.obsm["gaps"], query.obsm["gaps"] = np.ones((60, 2)), np.ones((25, 2))
    query.obsm["gaps"][0, 0] = np.nan
    with pytest.raises(error, match=message):
        transfer_labels(query, reference, **({"key": "kind"} | options))
    assert not set(query.obs)
    assert not query.uns


def test_a_reference_that_is_a_path_is_an_error(query) -> None:
    with pytest.raises(TypeError, match=naming("reference", "AnnData", "str", "anndata.read_h5ad")):
        transfer_labels(query, "atlas.h5ad", key="kind")
