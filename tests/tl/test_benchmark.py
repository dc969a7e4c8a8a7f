"""Scores of embeddings, compared with scib-metrics and with computation by hand."""

from __future__ import annotations

import re

import anndata as ad
import igraph
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from messages import naming
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from scllm import metrics
from scllm.tl import embed, finetune
from scllm.tl._benchmark import _leiden, _neighbors, _pca, benchmark

BIO = list(metrics.BIO_METRICS)
BATCH = list(metrics.BATCH_METRICS)


@pytest.fixture
def embedded(adata) -> ad.AnnData:
    """A good embedding, which separates types and mixes batches, and noise."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 8))
    adata.obsm["X_good"] = noise + 6 * (adata.obs["cell_type"] == "A").to_numpy()[:, None] * (np.arange(8) == 0)
    adata.obsm["X_noise"] = rng.normal(size=(60, 8))
    return adata


def test_good_embedding_beats_noise(embedded) -> None:
    table = benchmark(embedded, use_rep=["X_good", "X_noise"], key="cell_type", batch_key="batch")
    assert table.index.tolist() == ["X_good", "X_noise"]
    assert (table.loc["X_good", BIO] > table.loc["X_noise", BIO]).all()
    assert table.loc["X_good", BIO].min() > 0.6
    assert table.loc["X_noise", "ari"] < 0.1
    assert table[BATCH].min(axis=None) > 0.5


def test_means_are_those_of_scib(embedded) -> None:
    table = benchmark(embedded, use_rep="X_good", key="cell_type", batch_key="batch")
    row = table.loc["X_good"]
    assert row["bio"] == pytest.approx(row[BIO].mean())
    assert row["batch"] == pytest.approx(row[BATCH].mean())
    assert row["overall"] == pytest.approx(0.6 * row["bio"] + 0.4 * row["batch"])
    without = benchmark(embedded, use_rep="X_good", key="cell_type")
    assert without.columns.tolist() == [*BIO, "bio", "overall"]
    assert without.loc["X_good", "overall"] == pytest.approx(row["bio"])


def test_scores_agree_with_scib_metrics(embedded) -> None:
    scib = pytest.importorskip("scib_metrics")
    labels, batches = embedded.obs["cell_type"].to_numpy(str), embedded.obs["batch"].to_numpy(str)
    row = benchmark(embedded, use_rep="X_good", key="cell_type", batch_key="batch").loc["X_good"]
    values = embedded.obsm["X_good"]
    assert row["silhouette_label"] == pytest.approx(float(scib.silhouette_label(values, labels)), abs=1e-4)
    assert row["silhouette_batch"] == pytest.approx(float(scib.silhouette_batch(values, labels, batches)), abs=1e-4)


def test_neighbours_and_the_graph_are_computed_once_per_embedding(embedded, monkeypatch) -> None:
    made = []
    neighbors, graph = sc.pp.neighbors, igraph.Graph
    monkeypatch.setattr(sc.pp, "neighbors", lambda *data, **how: made.append("neighbours") or neighbors(*data, **how))
    monkeypatch.setattr(igraph, "Graph", lambda **how: made.append("graph") or graph(**how))
    benchmark(embedded, use_rep=["X_good", "X_noise"], key="cell_type", batch_key="batch")
    assert made == ["neighbours", "graph"] * 2


def test_one_progress_bar_counts_the_steps_of_all_embeddings(embedded, monkeypatch) -> None:
    bars = []

    def counted(items, *, desc, total):
        items = list(items)
        bars.append((len(items), total))
        return items

    monkeypatch.setattr("scllm.tl._benchmark.progress", counted)
    benchmark(embedded, use_rep=["X_good", "X_noise"], key="cell_type")
    benchmark(embedded, use_rep=["X_good", "X_noise"], key="cell_type", batch_key="batch")
    assert bars == [(8, 8), (10, 10)]


@pytest.mark.slow
def test_approximate_neighbours_are_reproducible_and_close_to_exact() -> None:
    values = np.random.default_rng(0).normal(size=(8192, 4)).astype(np.float32)
    graph, near = _neighbors(values)
    assert near.nnz == 8192 * 15  # the cell itself is one of them only where scanpy searches exactly
    assert not near.diagonal().any()
    exact = NearestNeighbors(n_neighbors=15).fit(values).kneighbors_graph()
    assert near.astype(bool).multiply(exact.astype(bool)).nnz > 0.95 * exact.nnz
    again, _ = _neighbors(values)
    assert (again != graph).nnz == 0


def test_clusters_are_those_of_scanpy(embedded) -> None:
    sc.pp.neighbors(embedded, use_rep="X_noise", n_neighbors=15, random_state=0)
    sc.tl.leiden(embedded, resolution=1.0, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    clusters = list(_leiden(embedded.obsp["connectivities"]))
    assert len(clusters) == 10
    assert max(metrics.clustering_agreement(clusters, embedded.obs["leiden"])) > 0.7


def test_pca_of_a_sparse_matrix_stays_sparse(embedded, monkeypatch) -> None:
    def densify(*_, **__):
        raise AssertionError("the matrix was made dense")

    for kind in (sparse.csr_matrix, sparse.csc_matrix):
        monkeypatch.setattr(kind, "toarray", densify)
        monkeypatch.setattr(kind, "todense", densify)
    assert _pca(embedded).shape == (60, 39)


def test_pca_is_the_baseline_and_not_written(embedded) -> None:
    table = benchmark(embedded, use_rep=["X_good", "X_pca"], key="cell_type")
    assert "X_pca" not in embedded.obsm
    assert embedded.X.max() > 5  # still counts
    sc.pp.normalize_total(embedded, target_sum=1e4)
    sc.pp.log1p(embedded)
    sc.pp.pca(embedded, n_comps=39)
    own = benchmark(embedded, use_rep="X_pca", key="cell_type")
    pd.testing.assert_series_equal(table.loc["X_pca"], own.loc["X_pca"])


def test_pca_reads_the_counts_layer_and_does_not_log_twice(embedded) -> None:
    expected = benchmark(embedded, use_rep="X_pca", key="cell_type")
    layered = embedded.copy()
    layered.layers["counts"] = layered.X.copy()
    layered.X = layered.X * 0
    pd.testing.assert_frame_equal(benchmark(layered, use_rep="X_pca", key="cell_type"), expected)
    logged = embedded.copy()
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    pd.testing.assert_frame_equal(benchmark(logged, use_rep="X_pca", key="cell_type"), expected)


def test_table_is_recorded_and_can_be_written(embedded, tmp_path) -> None:
    table = benchmark(embedded, use_rep=["X_good", "X_noise"], key="cell_type", batch_key="batch")
    embedded.write_h5ad(tmp_path / "a.h5ad")
    embedded.write_zarr(tmp_path / "a.zarr")
    for back in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        entry = back.uns["scllm"]["benchmark"]
        pd.testing.assert_frame_equal(entry["table"], table)
        assert list(entry["params"]["use_rep"]) == ["X_good", "X_noise"]
        assert entry["params"]["key"] == "cell_type"
    alone = embedded.copy()
    benchmark(alone, use_rep="X_good", key="cell_type")
    assert "batch_key" not in alone.uns["scllm"]["benchmark"]["params"]


def test_results_are_reproducible_and_global_random_state_is_unchanged(embedded) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = benchmark(embedded, use_rep=["X_noise", "X_pca"], key="cell_type", batch_key="batch")
    again = benchmark(embedded, use_rep=["X_noise", "X_pca"], key="cell_type", batch_key="batch")
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_unlabelled_cells_are_ignored_with_a_warning(embedded) -> None:
    kept = embedded[4:].copy()
    embedded.obs.loc[embedded.obs_names[:4], "cell_type"] = np.nan
    with pytest.warns(UserWarning, match=naming("4 of 60", "obs['cell_type']")):
        table = benchmark(embedded, use_rep="X_good", key="cell_type")
    pd.testing.assert_frame_equal(table, benchmark(kept, use_rep="X_good", key="cell_type"))
    assert embedded.uns["scllm"]["benchmark"]["params"]["n_cells"] == 56


def test_classes_too_small_for_the_folds_are_ignored_with_a_warning(embedded) -> None:
    embedded.obs["cell_type"] = embedded.obs["cell_type"].cat.add_categories("rare")
    embedded.obs.loc[embedded.obs_names[:4], "cell_type"] = "rare"
    with pytest.warns(UserWarning, match=naming("obs['cell_type']", 5, "'rare'")):
        benchmark(embedded, use_rep="X_good", key="cell_type")


def transferred_slowly(values, labels, reference) -> float:
    """Label each cell outside the reference by its 15 nearest cells in it; return the accuracy."""
    right = []
    for cell in np.flatnonzero(~reference):
        distance = np.linalg.norm(values[reference] - values[cell], axis=1)
        votes = pd.Series(labels[reference][np.argsort(distance)[:15]]).value_counts()
        if labels[cell] in labels[reference]:
            right.append(sorted(votes.index[votes == votes.max()])[0] == labels[cell])
    return float(np.mean(right))


def test_labels_are_transferred_between_a_reference_and_the_other_batches(embedded) -> None:
    embedded.obs["study"] = pd.Categorical(np.random.default_rng(0).choice(["x", "y/z", "w"], 60))
    embedded.obs["cell_type"] = embedded.obs["cell_type"].astype(str)
    # a class that the reference lacks
    embedded.obs.loc[embedded.obs_names[embedded.obs["study"] != "y/z"][:5], "cell_type"] = "C"
    names = ["X_good", "X_noise"]
    table = benchmark(embedded, use_rep=names, key="cell_type", batch_key="study", reference="y/z")
    labels, is_reference = embedded.obs["cell_type"].to_numpy(), (embedded.obs["study"] == "y/z").to_numpy()
    for name in names:
        for column, inside in zip(metrics.TRANSFER_METRICS, (is_reference, ~is_reference), strict=True):
            expected = transferred_slowly(embedded.obsm[name], labels, inside)
            assert table.loc[name, column] == pytest.approx(expected)
    assert table.loc["X_good", "transfer_from_reference"] > table.loc["X_noise", "transfer_from_reference"] + 0.2
    without = benchmark(embedded, use_rep=names, key="cell_type", batch_key="study")
    pd.testing.assert_frame_equal(table.drop(columns=list(metrics.TRANSFER_METRICS)), without)
    assert "transfer" not in embedded.uns["scllm"]["benchmark"]


@pytest.mark.parametrize("each", [True, "each"])
def test_each_batch_can_be_the_reference_in_turn(embedded, tmp_path, each) -> None:
    embedded.obs["study"] = pd.Categorical(np.random.default_rng(0).choice([1, 2, 3], 60))
    options = {"use_rep": ["X_good", "X_noise"], "key": "cell_type", "batch_key": "study"}
    alone = [benchmark(embedded, **options, reference=name) for name in ("1", "2", "3")]
    table = benchmark(embedded, **options, reference=each)
    embedded.write_h5ad(tmp_path / "a.h5ad")
    entry = ad.read_h5ad(tmp_path / "a.h5ad").uns["scllm"]["benchmark"]
    long = entry["transfer"].set_index(["reference", "embedding"])
    assert entry["params"]["reference"] == each
    for column in metrics.TRANSFER_METRICS:
        separate = pd.concat([one[column] for one in alone], keys=["1", "2", "3"], names=["reference"])
        np.testing.assert_allclose(long.loc[separate.index, column], separate)
        np.testing.assert_allclose(table[column], separate.unstack("reference").mean(axis=1)[table.index])


def test_a_reference_is_a_batch(embedded) -> None:
    with pytest.raises(TypeError, match=naming("batch_key=", "reference='first'")):
        benchmark(embedded, use_rep="X_good", key="cell_type", reference="first")
    with pytest.raises(KeyError, match=naming("'firs'", "obs['batch']", "Did you mean 'first'", "'each'")):
        benchmark(embedded, use_rep="X_good", key="cell_type", batch_key="batch", reference="firs")
    assert "scllm" not in embedded.uns


def test_bad_input_is_named(embedded) -> None:
    embedded.obs["one"] = pd.Categorical(["A"] * 60)
    with pytest.raises(KeyError, match="Did you mean 'cell_type'"):
        benchmark(embedded, use_rep="X_good", key="celltype")
    with pytest.raises(KeyError, match=r"'X_god' is not in adata\.obsm\. Did you mean 'X_good'\?.*scllm\.tl\.embed"):
        benchmark(embedded, use_rep="X_god", key="cell_type")
    with pytest.raises(KeyError, match="Did you mean 'batch'"):
        benchmark(embedded, use_rep="X_good", key="cell_type", batch_key="batsch")
    with pytest.raises(ValueError, match="'one'"):
        benchmark(embedded, use_rep="X_good", key="one")
    with pytest.raises(ValueError, match=r"'one'\].* got one \('A'\)"):
        benchmark(embedded, use_rep="X_good", key="cell_type", batch_key="one")
    assert "scllm" not in embedded.uns


def test_batches_confounded_with_types_are_scored_without_the_silhouette(embedded) -> None:
    row = benchmark(embedded.copy(), use_rep="X_good", key="cell_type", batch_key="cell_type").loc["X_good"]
    assert np.isnan(row["silhouette_batch"])
    assert row["batch"] == pytest.approx(row[["graph_connectivity", "batch_mixing"]].mean())


def test_an_embedding_trained_on_the_labels_causes_a_warning(adata, tiny, tmp_path, caplog):
    tuned = finetune(adata, tiny, key="cell_type", epochs=1, run_dir=tmp_path / "run")
    embed(adata, tiny)
    benchmark(adata, use_rep="X_scllm", key="cell_type")
    assert "obsm['X_scllm']" not in caplog.text
    embed(adata, tuned)
    benchmark(adata, use_rep="X_scllm", key="cell_type")
    assert re.search(naming("obsm['X_scllm']", "'cell_type'", "fine-tuned"), caplog.text)


def test_only_embeddings_trained_on_the_labels_cause_a_warning(adata, tiny, tmp_path, caplog):
    tuned = finetune(adata, tiny, key="cell_type", epochs=1, run_dir=tmp_path / "run")
    embed(adata, tuned, key_added="X_tuned")
    embed(adata, tiny, key_added="X_base")
    assert "heads" not in adata.uns["scllm"]["embed"]["params"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")
    for back in (adata, ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        caplog.clear()
        benchmark(back, use_rep=["X_tuned", "X_base"], key="cell_type")
        assert "obsm['X_tuned']" in caplog.text
        assert "obsm['X_base']" not in caplog.text
    embed(back, tiny, key_added="X_tuned")
    assert "heads" not in back.uns["scllm"]["embed"]


def test_pca_of_a_backed_matrix_is_that_of_one_in_memory(embedded, tmp_path) -> None:
    expected = benchmark(embedded, use_rep="X_pca", key="cell_type")
    embedded.write_h5ad(tmp_path / "sparse.h5ad")
    embedded.X = embedded.X.toarray()
    embedded.write_h5ad(tmp_path / "dense.h5ad")
    found = benchmark(ad.read_h5ad(tmp_path / "sparse.h5ad", backed="r"), use_rep="X_pca", key="cell_type")
    pd.testing.assert_frame_equal(found, expected)
    found = benchmark(ad.read_h5ad(tmp_path / "dense.h5ad", backed="r"), use_rep="X_pca", key="cell_type")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)


def test_pca_without_a_matrix_says_what_to_do(embedded) -> None:
    embedded.X = None
    with pytest.raises(ValueError, match=naming("X", "'counts'", "'X_pca'", "use_rep=")):
        benchmark(embedded, key="cell_type", use_rep=["X_good", "X_pca"])
