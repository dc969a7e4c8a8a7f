"""scFoundation against outputs of the original, and as a family of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scanpy as sc
import torch
from anndata import read_h5ad
from forms import FORMS, rows_of, stored_as
from messages import naming

from scllm import models, tl
from scllm.data import genes
from scllm.data.encode import DepthEncoder
from scllm.data.source import open_source
from scllm.engine.loader import Loader
from scllm.engine.objectives import MaskedExpression
from scllm.kernels.draws import mix
from scllm.models import scfoundation, storage
from scllm.models.base import Batch, HeadSpec
from scllm.models.batch import Measured

CLOSE = {"atol": 5e-5, "rtol": 5e-4}
DECODED = {"atol": 2e-4, "rtol": 2e-3}


@pytest.fixture(scope="session")
def parity(shared):
    return shared / "parity" / "scfoundation"


@pytest.fixture(scope="session")
def gene_list(shared):
    return models.Vocab.read(shared / "data" / "dictionaries" / "scfoundation_gene_list_19264.json.gz")


@pytest.fixture(scope="session")
def embeddings(parity):
    return dict(np.load(parity / "embeddings.npz"))


@pytest.fixture
def counts(parity):
    return read_h5ad(parity / "adata.h5ad")


def part(parity, gene_list, name, key_maximum="cell"):
    """One of the models of the file, with either form of the key maximum."""
    checkpoint = scfoundation.read(parity, vocab=gene_list, part=name)
    config = replace(checkpoint.config, key_maximum=key_maximum)
    built = scfoundation.Model(config, checkpoint.vocab, checkpoint.encoder)
    storage.load_weights(built, checkpoint.weights, source=parity)
    return built.eval()


def embedded(adata, model, encoder, pooling):
    model.encoder = encoder
    tl.embed(adata, model, pooling=pooling)
    return adata.obsm["X_scllm"]


def encoded(model, adata, **settings):
    match = genes.match(adata.var_names, model.vocab)
    tokens = replace(model.encoder, **settings)(match.tokens(rows_of(adata)), model.vocab, measured=match.measured)
    rows = np.arange(adata.n_obs)
    return Batch.from_tokens(tokens, mix(0, 0, rows), measured=Measured.of(match, rows))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("run", "name", "target", "pooling"),
    [
        ("cell_all_t4", None, "t4", None),
        ("cell_max_t4", "cell", "t4", "max"),
        ("cell_all_f2", "cell", "f2", "all"),
        ("rde_all_a1", "rde", "a1", "all"),
    ],
)
def test_parity_scfoundation_embeddings(parity, gene_list, embeddings, counts, run, name, target, pooling, form):
    model = models.load(parity, family="scfoundation", vocab=gene_list, part=name)
    found = embedded(stored_as(counts, form), model, DepthEncoder(target), pooling)
    np.testing.assert_allclose(found, embeddings[run], **CLOSE)


def test_parity_scfoundation_values_normalised_before(parity, gene_list, embeddings, counts):
    counts = stored_as(counts, "csr")
    totals = np.asarray(counts.X.sum(1)).ravel()
    values = counts.X.data / np.repeat(totals, counts.X.getnnz(1)) * 1e4
    counts.X.data = np.log1p(values).astype(np.float32)
    model = models.load(parity, family="scfoundation", vocab=gene_list)
    found = embedded(counts, model, DepthEncoder("t4", normalised=True), "all")
    np.testing.assert_allclose(found, embeddings["cell_all_t4_prenormT"], **CLOSE)


def test_parity_scfoundation_bulk(parity, gene_list, embeddings, counts):
    bulk = counts[:, [name in gene_list for name in counts.var_names]].copy()
    sc.pp.normalize_total(bulk)
    sc.pp.log1p(bulk)
    model = models.load(parity, family="scfoundation", vocab=gene_list)
    found = embedded(bulk, model, DepthEncoder("f1", normalised=True), "all")
    np.testing.assert_allclose(found, embeddings["bulk_all_F"], **CLOSE)


@torch.inference_mode()
def test_parity_scfoundation_gene_states(parity, gene_list, embeddings, counts):
    columns = torch.from_numpy(embeddings["gene_columns"])
    for key_maximum, run in (("cell", "gene_f1"), ("batch", "gene_batch_f1")):
        model = part(parity, gene_list, "gene", key_maximum)
        batch = encoded(model, counts, target="f1")
        states = model.gene_states(model.hidden(batch), batch)
        np.testing.assert_allclose(states[:, columns], embeddings[run], **DECODED)


def test_parity_scfoundation_expression_at_a_target_depth(parity, gene_list, embeddings, counts):
    model = part(parity, gene_list, "gene")
    model.encoder = DepthEncoder("f1")
    columns = embeddings["gene_columns"]
    names = np.array(model.vocab.genes)[columns[columns < len(gene_list)]]
    there = np.isin(names, counts.var_names)
    table = tl.reconstruct(counts, model, genes=list(names[there]), target_depth=10_000)
    expected = embeddings["gene_expression_t4"][:, : len(names)][:, there]
    assert there.sum() > 20
    np.testing.assert_allclose(table, expected, **DECODED)
    with torch.inference_mode():
        every = model.reconstruct_genes(encoded(model, counts, target="t4"), torch.from_numpy(columns))
    np.testing.assert_allclose(every, embeddings["gene_expression_t4"], **DECODED)


@torch.no_grad()
def test_parity_scfoundation_value_embedding(parity, gene_list):
    expected = np.load(parity / "value_embedding.npz")
    embedding = part(parity, gene_list, "cell").value_embedding
    values = torch.from_numpy(expected["values"]).flatten()
    np.testing.assert_allclose(embedding.weights(values), expected["bin_weights"][0], **CLOSE)
    np.testing.assert_allclose(embedding(values), expected["embedding"][0], **CLOSE)


@torch.inference_mode()
def test_parity_scfoundation_forward(parity, gene_list):
    expected = np.load(parity / "forward.npz")
    real = ~torch.from_numpy(expected["encoder_padding"])
    lengths = real.sum(1).tolist()
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ids, values = (torch.from_numpy(expected[f"encoder_{name}"])[real] for name in ("position_ids", "input_values"))
    batch = Batch(ids, values, ends, tuple(lengths), torch.zeros(len(lengths), dtype=torch.long))
    columns = torch.from_numpy(expected["decoder_columns"])
    together, alone = part(parity, gene_list, "gene", "batch"), part(parity, gene_list, "gene")
    np.testing.assert_allclose(together.hidden(batch), expected["encoder_output"][real], **DECODED)
    np.testing.assert_allclose(together.reconstruct_genes(batch, columns), expected["prediction"], **DECODED)
    first = expected["prediction_first_cell_alone"]
    np.testing.assert_allclose(alone.reconstruct_genes(batch, columns)[: len(first)], first, atol=2e-5, rtol=2e-4)


def test_parity_scfoundation_native_round_trip_is_equal_to_the_bit(parity, gene_list, counts, tmp_path):
    model = models.load(parity / "models.ckpt", family="scfoundation", vocab=gene_list)
    model.save(tmp_path / "native")
    again = models.load(tmp_path / "native")
    assert (again.config, again.vocab, again.encoder) == (model.config, model.vocab, model.encoder)
    with torch.inference_mode():
        batch = encoded(model, counts)
        assert torch.equal(model(batch).heads["value"], again(batch).heads["value"])


def test_parts_that_are_not_there_and_missing_gene_lists_are_named(parity, gene_list):
    with pytest.raises(ValueError, match=naming("part", "'bulk'", "'cell'")):
        models.load(parity, family="scfoundation", vocab=gene_list, part="bulk")
    with pytest.raises(ValueError, match=naming("gene names", 19264, "vocab=")):
        models.load(parity, family="scfoundation")


@pytest.fixture
def tiny(adata):
    torch.manual_seed(0)
    return models.build("scfoundation", vocab=[*adata.var_names, "gene_not_measured"], size="tiny").eval()


def test_embeddings_depend_on_the_cell_alone(adata, tiny):
    tl.embed(adata, tiny)
    expected = adata.obsm["X_scllm"].copy()
    assert expected.shape == (60, 4 * 64)
    order = np.random.default_rng(0).permutation(adata.n_obs)
    for batch_size in (1, 7, 60):
        other = adata[order].copy()
        tl.embed(other, tiny, batch_size=batch_size)
        np.testing.assert_allclose(other.obsm["X_scllm"], expected[order], atol=1e-5)


def test_reconstruction_depends_on_the_cell_alone_and_on_the_depth_asked_for(adata, tiny):
    whole = tl.reconstruct(adata, tiny, copy=True).layers["reconstructed"]
    assert (whole.astype(bool) != adata.X.astype(bool)).nnz == 0
    alone = tl.reconstruct(adata[7:8].copy(), tiny, copy=True).layers["reconstructed"]
    np.testing.assert_allclose(alone.data, whole[7].data, atol=1e-5)
    same = tl.reconstruct(adata, tiny, target_depth=10_000, copy=True).layers["reconstructed"]
    np.testing.assert_allclose(same.data, whole.data, atol=1e-5)
    deeper = tl.reconstruct(adata, tiny, target_depth=1_000_000, copy=True).layers["reconstructed"]
    assert abs(deeper.data - whole.data).max() > 1e-3
    with pytest.raises(ValueError, match=naming("target_depth", -1, "positive")):
        tl.reconstruct(adata, tiny, target_depth=-1)


@torch.no_grad()
def test_hidden_genes_are_predicted_without_their_values(adata, tiny):
    batch = encoded(tiny, adata[:4])
    at = torch.tensor([0, 5, batch.lengths[0] + 1])
    other = batch.with_values(batch.values.index_fill(0, at, 7.5))
    hidden, shown = (tiny.reconstruct(some, at, hide=True) for some in (batch, other))
    assert torch.equal(hidden, shown)
    assert not torch.allclose(*(tiny.reconstruct(some, at, hide=False) for some in (batch, other)))


def loader(adata, model, **settings):
    source, match = open_source(adata), genes.match(adata.var_names, model.vocab)
    rows = np.arange(adata.n_obs)
    return Loader(source, rows, match, model.encoder, model.vocab, adata.n_obs, keep_whole=True, **settings)


def test_thinned_cells_are_asked_for_their_depth_and_expression_before(adata, tiny):
    tiny.encoder = DepthEncoder(max_len=12)
    ((batch,),) = loader(adata, tiny, downsample=0.8).epoch(0)
    order = [np.flatnonzero(mix(0, 0, np.arange(60)) == key).item() for key in batch.keys]
    cells = adata[order]
    total = np.asarray(cells.X.sum(1)).ravel()
    last = batch.whole.cu_seqlens[1:].long() - 1
    np.testing.assert_allclose(batch.whole.values[last], np.log10(total), rtol=1e-5)
    assert (batch.values[batch.cu_seqlens[1:].long() - 1].numpy() < np.log10(total)).mean() > 0.9
    assert max(batch.lengths) == 12
    assert list(batch.whole.lengths) == (cells.X.getnnz(1) + 2).tolist()
    seen = []
    tiny.inputs, read = lambda shown: seen.append(shown) or read(shown), tiny.inputs
    MaskedExpression()(tiny, batch, 0)
    np.testing.assert_allclose(seen[0].values[seen[0].cu_seqlens[1:].long() - 2], np.log10(total), rtol=1e-5)


def test_shares_of_expressed_genes_and_of_zeros_are_asked_for_and_leave_the_sentence(adata, tiny):
    batch = encoded(tiny, adata)
    dense = torch.zeros(60, tiny.n_positions)
    dense[batch.cell, batch.genes] = batch.values
    cell, gene = MaskedExpression().asked(tiny, batch, dense)
    expressed = dense[cell, gene] > 0
    n_expressed = adata.X.nnz
    assert 0.25 < expressed.sum() / n_expressed < 0.35
    assert 0.015 < (~expressed).sum() / (60 * 40 - n_expressed) < 0.045
    assert gene.max() < 40  # neither depths nor the gene that was not measured
    seen = []
    tiny.inputs, read = lambda shown: seen.append(shown) or read(shown), tiny.inputs
    loss = MaskedExpression()(tiny, batch, 0)
    assert loss.count == len(cell)
    left_out = (len(batch.genes) - len(seen[0].genes)) / expressed.sum()
    assert 0.85 < left_out < 0.95


def test_eight_cells_are_learnt_by_heart(adata, tiny):
    tiny.train()
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch, objective = encoded(tiny, adata[:8]), MaskedExpression()
    optimizer = torch.optim.Adam(tiny.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss = objective(tiny, batch, 0)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.sum.detach() / loss.count))
    assert losses[-1] < losses[0] / 10


def test_a_run_trains_alike_in_micro_batches_and_its_model_is_tuned_and_classifies(adata, tmp_path):
    def run(accumulate):
        config = tl.TrainConfig(accumulate=accumulate, steps=5)
        options = {"size": "tiny", "dropout": 0.0, "run_dir": tmp_path / str(accumulate), "config": config}
        return tl.pretrain(adata, "scfoundation", **options)

    whole, parts = run(1), run(4)
    assert adata.uns["scllm"]["pretrain"]["params"]["downsample"] == 0.8
    np.testing.assert_allclose(whole.history["loss"], parts.history["loss"], rtol=1e-4)
    tuned = tl.finetune(adata, whole, key="cell_type", epochs=15, lr=1e-4, run_dir=tmp_path / "tuned")
    tl.classify(adata, tuned)
    assert (adata.obs["scllm_label"].astype(str) == adata.obs["cell_type"].astype(str)).mean() > 0.9


def test_random_features_are_drawn_anew_only_where_the_decoder_is_trained(adata):
    model = models.build("scfoundation", vocab=adata.var_names, size="tiny", redraw_every=2).train()
    names = [name for name in model.state_dict() if name.endswith("projection")]
    before = {name: model.state_dict()[name].clone() for name in names}
    model.set_heads([HeadSpec("cell_type", ("A", "B"))])
    model.at_step(2, 0)
    assert names
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in names)
    model.set_heads([])
    model.at_step(2, 0)
    assert not any(torch.equal(model.state_dict()[name], before[name]) for name in names)


def test_published_size():
    with torch.device("meta"):
        model = scfoundation.Model(
            scfoundation.Config(), scfoundation.Config().vocab(map(str, range(19_264))), DepthEncoder()
        )
    encoder = 12 * (4 * 768 * 769 + 768 * 3072 * 2 + 3072 + 768 + 4 * 768)
    decoder = 6 * (4 * 512 * 513 + 512 * 2048 * 2 + 2048 + 512 + 4 * 512)
    values, rest = 100 * 2 + 100 * 101 + 102 * 768, 2 * 768 + 512 * 769 + 4 * 512 + 513
    assert model.n_parameters == 19_267 * 768 + encoder + decoder + values + rest == 119_252_285
