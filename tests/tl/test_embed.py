"""Embeddings depend only on the cell and the model."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch
import zarr
from forms import FORMS, rows_of, stored_as
from messages import naming
from scipy import sparse

from scllm import models
from scllm.data.encode import BinEncoder
from scllm.data.genes import match
from scllm.data.tokens import Tokens
from scllm.kernels.binning import bin_rows
from scllm.models.base import Batch
from scllm.models.rank_weights import rank_weights
from scllm.tl import embed, embed_genes

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def embedded(adata, tiny) -> ad.AnnData:
    embed(adata, tiny)
    return adata


def sentences(adata, model) -> list[Batch]:
    """Embed each cell in its own batch."""
    genes = match(adata.var_names, model.vocab)
    tokens = model.encoder(genes.tokens(rows_of(adata)), model.vocab, measured=genes.measured)
    return [Batch.from_tokens(tokens.take(np.array([cell]))) for cell in range(adata.n_obs)]


def test_an_embedding_is_the_unit_cls_state(embedded, tiny):
    assert embedded.obsm["X_scllm"].dtype == np.float32
    for cell, batch in enumerate(sentences(embedded, tiny)[:20]):
        with torch.no_grad():
            state = tiny(batch).hidden[0]
        np.testing.assert_allclose(embedded.obsm["X_scllm"][cell], state / state.norm(), **CLOSE)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_batch_size_does_not_matter(embedded, tiny, batch_size):
    embed(embedded, tiny, batch_size=batch_size, key_added="again")
    np.testing.assert_allclose(embedded.obsm["again"], embedded.obsm["X_scllm"], **CLOSE)


def test_order_and_company_do_not_matter(embedded, tiny):
    order = np.random.default_rng(0).permutation(60)
    shuffled = embedded[order].copy()
    embed(shuffled, tiny)
    np.testing.assert_allclose(shuffled.obsm["X_scllm"], embedded.obsm["X_scllm"][order], **CLOSE)
    for cell in (0, 31):
        alone = embedded[[cell]].copy()
        embed(alone, tiny)
        np.testing.assert_allclose(alone.obsm["X_scllm"][0], embedded.obsm["X_scllm"][cell], **CLOSE)


def test_the_order_of_genes_does_not_matter(embedded, tiny):
    turned = embedded[:, np.arange(40)[::-1]].copy()
    view = embed(embedded[:, np.arange(40)[::-1]], tiny, copy=True)
    embed(turned, tiny)
    np.testing.assert_allclose(turned.obsm["X_scllm"], embedded.obsm["X_scllm"], **CLOSE)
    np.testing.assert_allclose(view.obsm["X_scllm"], embedded.obsm["X_scllm"], **CLOSE)


@pytest.mark.parametrize("ties", ["middle", "random"])
def test_the_same_call_gives_the_same_bits_and_leaves_randomness_alone(adata, tiny, ties):
    tiny.encoder = BinEncoder(ties=ties, max_len=9)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    embed(adata, tiny)
    embed(adata, tiny, key_added="again")
    np.testing.assert_array_equal(adata.obsm["again"], adata.obsm["X_scllm"])
    assert torch.equal(states[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002


def test_random_ties_depend_on_the_cell_only(adata, tiny):
    tiny.encoder = BinEncoder(ties="random")
    embed(adata, tiny)
    part = adata[[40, 3]].copy()
    embed(part, tiny)
    np.testing.assert_allclose(part.obsm["X_scllm"], adata.obsm["X_scllm"][[40, 3]], **CLOSE)


@pytest.mark.parametrize("kind", ["h5ad", "zarr", "backed", "list", "folder"])
def test_stored_cells_get_the_same_embedding(embedded, tiny, tmp_path, kind):
    expected = embedded.obsm["X_scllm"]
    embedded.write_h5ad(tmp_path / "a.h5ad")
    if kind in ("list", "folder"):
        (tmp_path / "parts").mkdir()
        embedded[:25].write_h5ad(tmp_path / "parts" / "a.h5ad")
        embedded[25:].copy().write_zarr(tmp_path / "parts" / "b.zarr")
    match kind:
        case "h5ad":
            data = tmp_path / "a.h5ad"
        case "zarr":
            embedded.write_zarr(tmp_path / "a.zarr")
            data = str(tmp_path / "a.zarr")
        case "backed":
            data = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
            embed(data, tiny, key_added="again")
            np.testing.assert_allclose(data.obsm["again"], expected, **CLOSE)
            assert "again" not in ad.read_h5ad(tmp_path / "a.h5ad").obsm
            return
        case "list":
            data = [tmp_path / "parts" / "a.h5ad", tmp_path / "parts" / "b.zarr"]
        case "folder":
            data = tmp_path / "parts"
    np.testing.assert_allclose(embed(data, tiny), expected, **CLOSE)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_a_large_embedding_is_streamed_into_a_file(embedded, tiny, tmp_path, suffix):
    embedded.write_h5ad(tmp_path / "a.h5ad")
    out = tmp_path / f"embedding{suffix}"
    assert embed(tmp_path / "a.h5ad", tiny, out=out, batch_size=7) is None
    found = np.load(out) if suffix == ".npy" else zarr.open_array(out)[:]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, embedded.obsm["X_scllm"], **CLOSE)


def test_bfloat16_points_the_same_way(embedded, tiny):
    embed(embedded, tiny, precision="bf16", key_added="low")
    cosine = (embedded.obsm["low"] * embedded.obsm["X_scllm"]).sum(1)
    assert cosine.min() >= 0.999
    assert (embedded.obsm["low"] != embedded.obsm["X_scllm"]).any()


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("pooling", ["cls", "mean", "ranked", "linear", "max"])
def test_pooling_and_layer_are_those_of_one_cell_at_a_time(adata, tiny, pooling, layer):
    embed(adata, tiny, pooling=pooling, hidden_layer=layer)
    for cell, batch in enumerate(sentences(adata, tiny)[:12]):
        with torch.no_grad():
            states = tiny.inputs(batch)
            for block in list(tiny.layers)[: 3 + layer]:
                states = block(states, batch)
        genes = states[1:]  # the first token is <cls>
        if pooling in ("ranked", "linear"):
            weights = rank_weights(torch.zeros(len(genes), dtype=torch.long), batch.values[1:], 1, pooling)
            expected = (genes * weights[:, None]).sum(0)
        else:
            expected = {"cls": states[0], "mean": genes.mean(0), "max": genes.amax(0)}[pooling]
        np.testing.assert_allclose(adata.obsm["X_scllm"][cell], expected, **CLOSE)


def test_genes_of_one_token_are_summed(adata, tiny):
    expected = embed(adata, tiny, copy=True).obsm["X_scllm"]
    halves = adata.X.toarray() // 2
    twice = ad.AnnData(
        sparse.csr_matrix(np.concatenate([halves, adata.X.toarray() - halves], 1)),
        var={"symbol": [*adata.var_names] * 2},
    )
    embed(twice, tiny)
    np.testing.assert_allclose(twice.obsm["X_scllm"], expected, **CLOSE)


def test_a_layer_is_read_in_place_of_x(embedded, tiny):
    embedded.layers["counts"] = embedded.X
    embedded.X = sparse.csr_matrix(embedded.X[:, ::-1])
    embed(embedded, tiny, layer="counts", key_added="again")
    embed(embedded, tiny, key_added="other")
    np.testing.assert_array_equal(embedded.obsm["again"], embedded.obsm["X_scllm"])
    assert np.abs(embedded.obsm["other"] - embedded.obsm["X_scllm"]).max() > 1e-3


def test_a_copy_leaves_the_original_alone(adata, tiny):
    changed = embed(adata, tiny, copy=True)
    assert changed.obsm["X_scllm"].shape == (60, 16)
    assert not len(adata.obsm)
    assert not adata.uns


def test_a_model_in_training_mode_stays_in_it_and_embeds_without_dropout(embedded, tiny):
    tiny.train()
    embed(embedded, tiny, key_added="again")
    assert tiny.training
    np.testing.assert_allclose(embedded.obsm["again"], embedded.obsm["X_scllm"], **CLOSE)


def test_settings_are_recorded(adata, tiny):
    embed(adata, tiny, hidden_layer=-2)
    assert adata.uns["scllm"]["embed"]["params"] == {"pooling": "cls", "hidden_layer": -2, "key_added": "X_scllm"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_layer": -4}, ValueError, naming("hidden_layer", "got -4", -3, -1)),
        ({"hidden_layer": 0}, ValueError, naming("hidden_layer", "got 0", -3, -1)),
        ({"pooling": "all"}, ValueError, naming("pooling", "'all'", "'ranked'", "scgpt")),
        ({"batch_size": -1}, ValueError, naming("batch_size", -1)),
        ({"layer": "counts"}, KeyError, naming("layer 'counts'", "adata")),
        ({"out": "a.npy"}, TypeError, naming("out='a.npy'", "AnnData", "obsm")),
        ({"n_gpus": 8}, ValueError, naming("n_gpus", 8)),
        ({"n_gpus": [0, 1]}, TypeError, naming("n_gpus", "[0, 1]")),
        ({"device": "tpu3"}, ValueError, naming("device", "'tpu3'")),
    ],
)
def test_requests_that_cannot_be_met_write_nothing(adata, tiny, options, error, message):
    with pytest.raises(error, match=message):
        embed(adata, tiny, **options)
    assert not len(adata.obsm)
    assert not adata.uns


def test_requests_on_files_that_cannot_be_met(adata, tiny, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=naming("out", "a.csv", ".zarr", ".npy")):
        embed(tmp_path / "a.h5ad", tiny, out=tmp_path / "a.csv")
    with pytest.raises(TypeError, match=naming("copy=True", type(tmp_path).__name__, "out=")):
        embed(tmp_path / "a.h5ad", tiny, copy=True)
    with pytest.raises(ValueError, match=naming("model", "adata.uns['scllm']['model']")):
        embed(tmp_path / "a.h5ad")


# --- outputs of the original, see the README of the fixtures ---


@pytest.fixture(scope="session")
def parity(shared):
    return shared / "parity" / "scgpt"


@pytest.fixture(scope="session")
def original(parity):
    return dict(np.load(parity / "embed.npz"))


@pytest.fixture
def checkpoint(parity):
    return models.load(parity / "checkpoint", family="scgpt")


@pytest.fixture
def cells(parity) -> ad.AnnData:
    return ad.read_h5ad(parity / "adata.h5ad")


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_parity_scgpt_embedding_of_the_original_token_sequences(original, checkpoint, kind):
    genes, values = original[f"genes_{kind}"], original[f"binned_values_{kind}"]
    real = genes != checkpoint.vocab.pad_id
    indptr = np.concatenate([[0], np.cumsum(real.sum(1))])
    batch = Batch.from_tokens(Tokens(indptr, genes[real], values[real].astype(np.float32)))
    with torch.no_grad():
        np.testing.assert_allclose(checkpoint.embed(batch), original[f"X_scGPT_{kind}"], **CLOSE)


@pytest.mark.parametrize("form", FORMS)
def test_parity_scgpt_token_sequences(original, checkpoint, cells, form):
    """Genes and <cls> are equal; bins are equal where nothing is drawn, and within bounds elsewhere."""
    genes = match(cells.var_names, checkpoint.vocab, var=cells.var)
    counts = genes.tokens(rows_of(stored_as(cells, form)))
    assert checkpoint.encoder == BinEncoder(51, 1201, "random", -2, False)
    # the original sorts genes by column and we sort them by token; `<cls>` comes first in both
    key = np.where(original["genes_full"] == checkpoint.vocab.cls_id, -1, original["genes_full"])
    order = np.argsort(np.where(key == checkpoint.vocab.pad_id, len(checkpoint.vocab), key), axis=1, kind="stable")
    their_genes = np.take_along_axis(original["genes_full"], order, 1)
    theirs = np.take_along_axis(original["binned_values_full"], order, 1)
    bounds = [
        BinEncoder(51, 1201, ties, -2)(counts, checkpoint.vocab, measured=genes.measured).padded(
            pad_id=checkpoint.vocab.pad_id
        )
        for ties in ("left", "right")
    ]
    np.testing.assert_array_equal(bounds[0][0], their_genes)
    lowest, highest = bounds[0][1], bounds[1][1]
    assert (theirs[:, 0] == -2).all()
    assert (lowest[:, 0] == -2).all()
    assert ((lowest <= theirs) & (theirs <= highest)).all()
    ours = checkpoint.encoder(counts, checkpoint.vocab, measured=genes.measured).padded(pad_id=checkpoint.vocab.pad_id)
    np.testing.assert_array_equal(ours[0], their_genes)
    assert ((lowest <= ours[1]) & (ours[1] <= highest)).all()
    # with the draws of the original, the bins are equal everywhere
    generator = np.random.RandomState(int(original["numpy_seed"]))
    draws = [generator.rand(n)[places[1 : n + 1] - 1] for n, places in zip(counts.lengths, order, strict=True)]
    bins = bin_rows(counts.indptr, counts.values, n_bins=51, ties="random", draws=np.concatenate(draws))
    np.testing.assert_array_equal(bins, theirs[:, 1:][their_genes[:, 1:] != checkpoint.vocab.pad_id])


def test_parity_scgpt_a_folder_embeds_cells(original, checkpoint, cells, parity, tmp_path):
    embed(cells, checkpoint)
    np.testing.assert_allclose(np.linalg.norm(cells.obsm["X_scllm"], axis=1), 1, **CLOSE)
    # ties are drawn differently from the original, so results are similar but not equal
    assert ((cells.obsm["X_scllm"] * original["X_scGPT_full"]).sum(1)).min() > 0.98
    assert cells.uns["scllm"]["model"]["path"] == str(parity / "checkpoint")
    embed(cells, key_added="again")  # found again without family=
    np.testing.assert_array_equal(cells.obsm["again"], cells.obsm["X_scllm"])
    with pytest.raises(ValueError, match="family="):
        embed(cells, parity / "checkpoint")


def test_parity_scgpt_gene_embeddings(original, checkpoint, cells):
    np.testing.assert_array_equal(checkpoint.gene_table().detach(), original["gene_embeddings_raw"])
    with torch.no_grad():
        normed = checkpoint.embed_genes(torch.arange(len(checkpoint.vocab)))
    np.testing.assert_allclose(normed, original["gene_embeddings_encoder"], **CLOSE)
    embed_genes(cells, checkpoint)
    ids = checkpoint.vocab.ids(cells.var_names)
    known = ids >= 0
    np.testing.assert_array_equal(cells.varm["scllm_genes"][known], original["gene_embeddings_raw"][ids[known]])
    assert np.isnan(cells.varm["scllm_genes"][~known]).all()
    assert 0 < known.sum() < cells.n_vars


def test_a_batch_of_no_cells_is_an_error(adata, tiny):
    with pytest.raises(ValueError, match=r"batch_size.*whole number.* 0"):
        embed(adata, tiny, batch_size=0)


def test_data_are_never_replaced_by_their_embedding(adata, tiny, tmp_path):
    adata.write_zarr(tmp_path / "cells.zarr")
    other = tmp_path / "other.zarr"
    adata.write_zarr(other)
    for out in ("cells.zarr", "other.zarr"):
        with pytest.raises(ValueError, match=naming("out", str(tmp_path / out), "another path")):
            embed(tmp_path / "cells.zarr", tiny, out=tmp_path / out)
    assert ad.read_zarr(other).shape == adata.shape
    with pytest.raises(FileNotFoundError, match=naming("out", "nowhere")):
        embed(tmp_path / "cells.zarr", tiny, out=tmp_path / "nowhere" / "x.npy")
    for _ in range(2):
        embed(tmp_path / "cells.zarr", tiny, out=tmp_path / "embedding.zarr")
    assert zarr.open_array(tmp_path / "embedding.zarr").shape[0] == adata.n_obs


@pytest.fixture
def late_error(tmp_path) -> str:
    """Cells with a negative count in one of the last cells, which is only found when it is read."""
    counts = sparse.random_array(
        (20_000, 40), density=0.05, format="csr", dtype=np.float32, rng=np.random.default_rng(0)
    )
    counts.data[:] = 1
    counts.data[-1] = -1
    spoilt = ad.AnnData(sparse.csr_matrix(counts), layers={"counts": sparse.csr_matrix(counts)})
    spoilt.var_names = [f"gene_{i}" for i in range(40)]
    spoilt.write_h5ad(tmp_path / "late.h5ad")
    return str(tmp_path / "late.h5ad")


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_a_file_appears_only_when_it_is_complete(adata, tiny, tmp_path, late_error, suffix):
    out = tmp_path / f"embedding{suffix}"
    with pytest.raises(ValueError, match="X holds negative values"):
        embed(late_error, tiny, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["late.h5ad"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    embed(tmp_path / "a.h5ad", tiny, out=out)
    with pytest.raises(ValueError, match="X holds negative values"):
        embed(late_error, tiny, out=out)
    found = np.load(out) if suffix == ".npy" else zarr.open_array(out)[:]
    np.testing.assert_allclose(found, embed(tmp_path / "a.h5ad", tiny), **CLOSE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", out.name, "late.h5ad"]


def test_an_error_in_a_layer_names_the_layer(tiny, late_error):
    with pytest.raises(ValueError, match="layer 'counts' holds negative values"):
        embed(late_error, tiny, layer="counts")


def test_several_anndata_are_streamed_into_a_file(embedded, tiny, tmp_path):
    embed([embedded[:25], embedded[25:].copy()], tiny, out=tmp_path / "x.npy")
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), embedded.obsm["X_scllm"], **CLOSE)
