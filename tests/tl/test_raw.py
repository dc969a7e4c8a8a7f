"""``layer="raw"``: counts in ``.raw``, logarithms in X, as files of CELLxGENE are."""

from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from messages import naming
from scipy import sparse

import scllm
from scllm.data.fingerprint import fingerprint
from scllm.data.source import open_source
from scllm.data.vocab import Vocab

N_GENES = 60


@pytest.fixture(scope="module")
def cellxgene(shared) -> AnnData:
    """X logged and of half the genes, counts of all genes in ``.raw``, Ensembl ids as names."""
    counts = ad.read_h5ad(shared / "data" / "pbmc68k_reduced_counts.h5ad")[:80, : 2 * N_GENES].copy()
    has_id = (counts.var["ensembl_id"] != "").to_numpy()
    counts = counts[:, has_id].copy()
    counts = counts[np.asarray(counts.X.sum(1)).ravel() > 0].copy()
    counts.var = pd.DataFrame({"feature_name": counts.var_names.to_numpy()}, index=counts.var["ensembl_id"].to_numpy())
    adata = counts[:, :N_GENES].copy()
    adata.X = sparse.csr_matrix(adata.X.log1p() * 0.7)
    adata.X.data = np.log1p(counts[:, :N_GENES].X.data * 3.3)
    adata.raw = counts
    return adata


@pytest.fixture
def adata(cellxgene) -> AnnData:
    return cellxgene.copy()


@pytest.fixture
def as_counts(cellxgene) -> AnnData:
    """The same cells with the counts of all genes in X."""
    plain = cellxgene.raw.to_adata()
    plain.obs = cellxgene.obs.copy()
    return plain


@pytest.fixture(scope="module")
def ranks(cellxgene):
    """A model that needs counts, of symbols."""
    return scllm.models.build("scbert", vocab=list(cellxgene.raw.var["feature_name"]), size="tiny").eval()


def opened(adata: AnnData, kind: str, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    match kind:
        case "memory":
            return adata
        case "view":
            return adata[::-1, 5:][::-1]
        case "backed":
            return ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
        case "backed view":
            return ad.read_h5ad(tmp_path / "a.h5ad", backed="r")[10:40, 3:]
        case "h5ad":
            return tmp_path / "a.h5ad"
        case "zarr":
            adata.write_zarr(tmp_path / "a.zarr")
            return tmp_path / "a.zarr"
        case "list":
            return [tmp_path / "a.h5ad"]


@pytest.mark.parametrize("kind", ["memory", "view", "backed", "backed view", "h5ad", "zarr", "list"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_raw_is_read_with_its_own_genes_wherever_it_is(adata, as_counts, tmp_path, kind, form):
    raw = as_counts.copy()
    raw.X = raw.X.toarray() if form == "dense" else raw.X.asformat(form)
    adata.raw = raw
    source = open_source(opened(adata, kind, tmp_path), layer="raw")
    expected = as_counts[10:40] if kind == "backed view" else as_counts
    assert source.genes.equals(as_counts.var_names)
    assert source.var["feature_name"].tolist() == as_counts.var["feature_name"].tolist()
    assert source.obs_names.equals(expected.obs_names)
    np.testing.assert_array_equal(source.read(slice(None)).toarray(), expected.X.toarray())


def test_a_layer_that_is_called_raw_goes_before_it_and_that_is_logged(adata, tmp_path, caplog):
    adata.layers["raw"] = adata.X * 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    for data in (adata, tmp_path / "a.h5ad"):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="scllm"):
            source = open_source(data, layer="raw")
        assert source.genes.equals(adata.var_names)
        assert (source.read(slice(None)) != adata.layers["raw"]).nnz == 0
        assert "reading the layer 'raw'" in caplog.text


def test_without_raw_and_layer_the_message_says_that_there_is_neither(adata):
    del adata.raw
    with pytest.raises(KeyError, match=naming("layer 'raw'", "adata", ".raw", "layer=")):
        open_source(adata, layer="raw")


def test_the_message_that_refuses_logged_x_names_raw(adata, ranks, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    for data in (adata, tmp_path / "a.h5ad"):
        with pytest.raises(ValueError, match=r"adata\.raw holds counts: pass layer='raw'"):
            scllm.tl.embed(data, ranks)


@pytest.mark.parametrize("kind", ["memory", "view", "backed", "h5ad", "zarr", "list"])
def test_embeddings_of_raw_are_those_of_its_counts(adata, as_counts, ranks, tmp_path, kind):
    data = opened(adata, kind, tmp_path)
    expected = scllm.tl.embed(as_counts, ranks, copy=True).obsm["X_scllm"]
    found = scllm.tl.embed(data, ranks, layer="raw", copy=kind in ("memory", "view"))
    if isinstance(data, AnnData):
        found = (data if found is None else found).obsm["X_scllm"]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_layers_made_of_raw_hold_the_genes_of_adata(adata, as_counts):
    scllm.pp.bin_expression(adata, layer="raw")
    scllm.pp.rank_expression(adata, layer="raw")
    part = as_counts[:, adata.var_names].copy()
    scllm.pp.bin_expression(part)
    assert (adata.layers["binned"] != part.layers["binned"]).nnz == 0
    scllm.pp.gene_medians(as_counts)
    scllm.pp.rank_expression(part, medians=as_counts.var["median_expression"])
    assert (adata.layers["ranked"] != part.layers["ranked"]).nnz == 0


def test_medians_of_raw_are_over_all_its_genes(adata, as_counts, tmp_path):
    scllm.pp.gene_medians(as_counts)
    scllm.pp.gene_medians(adata, layer="raw")
    expected = as_counts.var["median_expression"]
    np.testing.assert_allclose(adata.var["median_expression"], expected[adata.var_names], equal_nan=True)
    adata.write_h5ad(tmp_path / "a.h5ad")
    streamed = scllm.pp.gene_medians(tmp_path / "a.h5ad", layer="raw")
    np.testing.assert_allclose(streamed, expected, rtol=1 / 128, equal_nan=True)


def test_a_gene_that_raw_lacks_is_an_error_where_a_layer_is_written(adata):
    adata.raw = adata[:, 2:].copy()
    for verb in (scllm.pp.bin_expression, scllm.pp.rank_expression):
        with pytest.raises(ValueError, match=rf"2 are not in it \('{adata.var_names[0]}'"):
            verb(adata, layer="raw")
    assert not list(adata.layers)


def test_tokens_of_raw_are_those_of_its_counts(adata, as_counts):
    for data, layer in ((adata, "raw"), (as_counts, None)):
        scllm.pp.tokenize(data, encoder="ranks", vocab=Vocab.from_genes(as_counts.var["feature_name"]), layer=layer)
    assert (adata.obsm["tokens"] != as_counts.obsm["tokens"]).nnz == 0
    scllm.pp.tokenize(adata, layer="raw")
    assert adata.uns["scllm"]["tokenize"]["table"]["token"].tolist()[: as_counts.n_vars] == list(as_counts.var_names)


def test_reconstructions_and_gene_embeddings_of_raw_hold_the_genes_of_adata(adata, as_counts, ranks):
    scllm.tl.reconstruct(adata, ranks, layer="raw")
    scllm.tl.reconstruct(as_counts, ranks)
    wanted = as_counts.var_names.get_indexer(adata.var_names)
    expected = as_counts.layers["reconstructed"][:, wanted]
    np.testing.assert_allclose(adata.layers["reconstructed"].toarray(), expected.toarray(), atol=1e-6)
    scllm.tl.embed_genes(adata, ranks, contextual=True, layer="raw")
    scllm.tl.embed_genes(as_counts, ranks, contextual=True)
    expected = as_counts.varm["scllm_genes"][wanted]
    np.testing.assert_allclose(adata.varm["scllm_genes"], expected, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", ["memory", "backed", "h5ad"])
def test_other_processes_train_on_raw_too(adata, as_counts, tmp_path, kind):
    data = opened(adata, kind, tmp_path)
    model = scllm.tl.pretrain(
        data, "geneformer", size="tiny", epochs=1, layer="raw", run_dir=tmp_path / "run", n_procs=2, device="cpu"
    )
    assert model.vocab.genes == tuple(as_counts.var_names)
    spec = scllm.engine.run.Run(tmp_path / "run").spec
    assert spec.data.layer == "raw"
    assert (spec.data_reference is None) == (kind == "memory")
    assert spec.data.fingerprint == fingerprint(open_source(adata, layer="raw"))


@pytest.mark.filterwarnings("ignore:after the first epoch")
def test_folds_and_labels_of_raw_are_those_of_its_counts(adata, as_counts, ranks):
    tables = {}
    for data, layer in ((adata, "raw"), (as_counts, None)):
        data.obs["label"] = pd.Categorical(np.where(np.arange(data.n_obs) % 2, "a", "b"))
        options = {"key": "label", "n_folds": 2, "epochs": 1, "batch_size": 40}
        tables[layer] = scllm.tl.cross_validate(data, ranks, layer=layer, **options)
    pd.testing.assert_frame_equal(tables["raw"], tables[None])


def test_gene_labels_of_raw_reach_the_genes_of_adata(adata, ranks):
    adata.var["kind"] = np.where(np.arange(adata.n_vars) % 2, "a", "b")
    scllm.tl.classify_genes(adata, ranks, labels="kind", n_folds=2, freeze="encoder", layer="raw")
    assert adata.var["gene_label"].notna().sum() > adata.n_vars // 2
