"""scBERT against outputs of the original, and as a family of its own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from forms import FORMS, rows_of, stored_as
from messages import naming
from scipy.sparse import csr_matrix
from torch.nn import functional as F

from scllm import models, tl
from scllm.data import genes
from scllm.engine.objectives import MaskedLevel
from scllm.models import scbert, storage
from scllm.models.base import Batch

CLOSE = {"atol": 5e-5, "rtol": 5e-4}


@pytest.fixture(scope="session")
def parity(shared):
    return shared / "parity" / "scbert"


@pytest.fixture(scope="session")
def arrays(parity):
    return dict(np.load(parity / "scbert.npz"))


@pytest.fixture
def model(parity):
    return models.load(parity, family="scbert")


@pytest.fixture(scope="session")
def counts(parity, arrays):
    return read_h5ad(parity / "adata.h5ad")[arrays["kept_cells"]].copy()


def in_batches(checkpoint):
    """The model with the original's maximum over the whole batch."""
    config = replace(checkpoint.config, key_maximum="batch")
    built = scbert.Model(config, checkpoint.vocab, checkpoint.encoder)
    built.set_heads(checkpoint.heads)
    storage.load_weights(built, checkpoint.weights, source="here")
    return built.eval()


def packed(tokens, vocab) -> Batch:
    """Rows of the original as a batch."""
    n_cells, length = tokens.shape
    return Batch(
        torch.arange(len(vocab)).repeat(n_cells),
        torch.from_numpy(tokens).flatten().float(),
        torch.arange(n_cells + 1, dtype=torch.int32) * length,
        (length,) * n_cells,
        torch.arange(n_cells),
    )


def encoded(model, adata, cells=slice(None)):
    match = genes.match(adata.var_names, model.vocab)
    counts = match.tokens(rows_of(adata)[cells])
    return counts, model.encoder(counts, model.vocab, measured=match.measured)


def test_parity_scbert_kept_cells(parity, arrays):
    adata = read_h5ad(parity / "adata.h5ad")
    listed = set(json.loads((parity / "reference_genes.json").read_text()))
    known = adata[:, [name in listed for name in adata.var_names]]
    least = json.loads((parity / "config.json").read_text())["min_genes"]
    assert adata.obs_names[known.X.getnnz(1) >= least].tolist() == arrays["kept_cells"].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_parity_scbert_tokens(model, counts, arrays, form):
    found, tokens = encoded(model, stored_as(counts, form))
    np.testing.assert_array_equal(tokens.values.reshape(arrays["tokens"].shape), arrays["tokens"])
    assert (tokens.genes.reshape(arrays["tokens"].shape) == np.arange(len(model.vocab))).all()
    row = np.repeat(np.arange(len(found)), found.lengths)
    # the original's logarithm is float32, whose last bit depends on the processor
    np.testing.assert_array_max_ulp(model.encoder.log2(found), arrays["log2_normalised"][row, found.genes], maxulp=2)


@torch.no_grad()
def test_parity_scbert_states_and_logits_of_the_batch(parity, arrays):
    model = in_batches(scbert.read(parity))
    logits = arrays["logits"]
    outputs = model(packed(arrays["tokens"][: len(logits)], model.vocab))
    np.testing.assert_allclose(outputs.hidden, arrays["encodings"].reshape(-1, model.config.d_model), **CLOSE)
    np.testing.assert_allclose(outputs.heads["level"], logits.reshape(-1, logits.shape[2]), **CLOSE)


@torch.no_grad()
def test_parity_scbert_logits_of_cells_alone(model, arrays):
    logits = arrays["logits_one_by_one"]
    found = model(packed(arrays["tokens"][: len(logits)], model.vocab)).heads["level"]
    np.testing.assert_allclose(found, logits.reshape(-1, logits.shape[2]), **CLOSE)


@torch.no_grad()
def test_parity_scbert_masked_loss(parity, arrays):
    model = in_batches(scbert.read(parity))
    labels = torch.from_numpy(arrays["mask_labels"]).flatten()
    found = model(packed(arrays["masked_input"], model.vocab)).heads["level"]
    np.testing.assert_allclose(found, arrays["masked_logits"].reshape(found.shape), **CLOSE)
    asked = labels < arrays["num_tokens"] - 1
    np.testing.assert_allclose(F.cross_entropy(found[asked], labels[asked]), arrays["masked_loss"], rtol=1e-4)


def tuned_checkpoint(parity, path):
    """A fine-tuned file as the original writes it: the classifier in the place of the decoder of levels."""
    weights = storage.read_torch(parity / "panglao_pretrain.pth")["model_state_dict"]
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("to_out.")}
    weights |= storage.read_torch(parity / "classifier_head.pth")
    torch.save({"epoch": 1, "model_state_dict": weights}, path)
    return path


@torch.no_grad()
def test_parity_scbert_classifier(parity, arrays, tmp_path):
    vocab = models.Vocab.read(parity / "reference_genes.json")
    file = tuned_checkpoint(parity, tmp_path / "tuned.pth")
    model = in_batches(scbert.read(file, vocab=vocab))
    expected = arrays["class_logits"]
    outputs = model.head_outputs(packed(arrays["tokens"][: len(expected)], model.vocab))
    np.testing.assert_allclose(outputs["cls"], expected, **CLOSE)
    loaded = models.load(file, family="scbert", vocab=parity / "reference_genes.json")
    assert [spec.n_outputs for spec in loaded.head_specs] == [expected.shape[1]]
    with pytest.raises(ValueError, match=naming("levels", "decoder", "pretrained")):
        loaded.reconstruct(packed(arrays["tokens"][:1], model.vocab), torch.tensor([0]), hide=False)


def test_parity_scbert_native_round_trip_is_equal_to_the_bit(model, arrays, tmp_path):
    batch = packed(arrays["tokens"][:3], model.vocab)
    model.save(tmp_path / "native")
    again = models.load(tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(model(batch).heads["level"], again(batch).heads["level"])
    assert (again.config, again.vocab, again.encoder) == (model.config, model.vocab, model.encoder)


@pytest.fixture
def tiny(adata):
    torch.manual_seed(0)
    return models.build("scbert", vocab=[*adata.var_names, "gene_not_measured"], size="tiny").eval()


@torch.no_grad()
def test_the_sentence_is_the_vocabulary(adata, tiny):
    _, tokens = encoded(tiny, adata[:3])
    total = np.asarray(adata.X[:3].sum(1))
    expected = np.floor(np.log2(1 + adata.X[:3].toarray() / total * 1e4)).clip(max=5)
    levels = tokens.values.reshape(3, 42)
    np.testing.assert_array_equal(levels[:, :40], expected)
    assert not levels[:, 40:].any()
    assert tiny.vocab.names(tokens.genes[:42]) == list(tiny.vocab.tokens)


def test_larger_vocabularies_keep_the_highest_values(adata, tiny):
    tiny.encoder = replace(tiny.encoder, max_len=6)
    _, tokens = encoded(tiny, adata[:3])
    counts = adata.X[:3].toarray()
    genes_kept = tokens.genes.reshape(3, 6)
    assert (genes_kept[:, -1] == tiny.vocab.eos_id).all()
    for kept, cell in zip(genes_kept[:, :-1], counts):
        assert cell[kept].min() >= np.sort(cell)[-5]


def test_embeddings_depend_on_the_cell_alone(adata, tiny):
    tl.embed(adata, tiny)
    expected = adata.obsm["X_scllm"].copy()
    order = np.random.default_rng(0).permutation(adata.n_obs)
    for batch_size in (1, 7, 60):
        other = adata[order].copy()
        tl.embed(other, tiny, batch_size=batch_size)
        np.testing.assert_allclose(other.obsm["X_scllm"], expected[order], atol=1e-5)


def test_long_sentences_go_through_few_at_a_time(adata, tiny, caplog):
    vocab = tiny.config.vocab([*adata.var_names, *(f"other{i}" for i in range(16_866))])
    long = scbert.Model(replace(tiny.config, n_layers=1, d_model=8, d_head=4), vocab, tiny.encoder).eval()
    for model, n_cells in ((tiny, 64), (long, 7)):
        caplog.clear()
        with caplog.at_level("INFO", logger="scllm"):
            tl.embed(adata[:2].copy(), model)
        assert f"{n_cells} at a time" in caplog.text


def test_contextual_gene_states_are_those_of_cells_that_express_the_gene(adata, tiny):
    tl.embed_genes(adata, tiny, contextual=True)
    _, tokens = encoded(tiny, adata)
    with torch.no_grad():
        states = tiny.hidden(Batch.from_tokens(tokens)).view(adata.n_obs, 42, -1)
    expressing = adata.X[:, [5]].toarray().ravel() > 0
    assert 0 < expressing.sum() < adata.n_obs
    np.testing.assert_allclose(adata.varm["scllm_genes"][5], states[expressing, 5].mean(0), atol=1e-5)


def test_eight_cells_are_learnt_by_heart(adata, tiny):
    tiny.train()
    objective = MaskedLevel(mask_ratio=(0.5,))
    # deep cells, so that counts are spread over levels: in shallow ones each has the highest
    counts = adata[:8].to_df() * 5
    counts["gene_39"] = 20_000
    cells = AnnData(csr_matrix(counts), var=adata.var)
    _, tokens = encoded(tiny, cells)
    batch = Batch.from_tokens(tokens, np.arange(8))
    assert len(np.unique(tokens.values)) == 6
    optimizer = torch.optim.Adam(tiny.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = objective(tiny, batch, 0)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.sum.detach() / loss.count))
    assert losses[-1] < losses[0] / 10


def test_only_expressed_genes_are_hidden_and_nine_in_ten_of_those_asked_for(adata, tiny):
    _, tokens = encoded(tiny, adata)
    batch = Batch.from_tokens(tokens, np.arange(adata.n_obs))
    seen = []
    tiny.hidden, read = lambda shown: seen.append(shown.values) or read(shown), tiny.hidden
    loss = MaskedLevel()(tiny, batch, 0)
    n_expressed = adata.X.getnnz(1)
    assert loss.count == np.ceil(0.15 * n_expressed - 1e-9).sum()
    hidden = seen[0] == tiny.hidden_level
    assert (batch.values[hidden] > 0).all()
    assert 0.8 < hidden.sum() / loss.count < 1


def test_reconstruction_keeps_the_sparsity_and_stays_among_the_levels(adata, tiny):
    tl.reconstruct(adata, tiny)
    layer = adata.layers["reconstructed"]
    assert (layer.astype(bool) != adata.X.astype(bool)).nnz == 0
    assert 0 <= layer.data.min() <= layer.data.max() <= 5
    table = tl.reconstruct(adata, tiny, genes=["gene_3", "gene_30"])
    expressed = adata.X[:, [3, 30]].toarray() > 0
    np.testing.assert_allclose(table.to_numpy()[expressed], layer[:, [3, 30]].toarray()[expressed], atol=1e-5)


def test_a_run_trains_alike_in_micro_batches_and_its_model_is_tuned_and_classifies(adata, tmp_path):
    torch.manual_seed(0)
    begun = models.build("scbert", vocab=adata.var_names, size="tiny", redraw_every=2)

    def run(accumulate):
        config = tl.TrainConfig(accumulate=accumulate, steps=6)
        return tl.pretrain(adata, begun, run_dir=tmp_path / str(accumulate), config=config)

    whole, parts = run(1), run(4)
    np.testing.assert_allclose(whole.history["loss"], parts.history["loss"], rtol=1e-4)
    # random features were drawn anew on the way, alike in both
    first, second, third = (model.layers[0].attention.projection for model in (begun, whole, parts))
    assert torch.equal(second, third)
    assert not torch.equal(first, second)
    tuned = tl.finetune(adata, whole, key="cell_type", epochs=6, lr=1e-3, run_dir=tmp_path / "tuned")
    tl.classify(adata, tuned)
    assert (adata.obs["scllm_label"].astype(str) == adata.obs["cell_type"].astype(str)).mean() > 0.9


def test_published_size():
    model = models.build("scbert", vocab=[f"g{i}" for i in range(16_906)])
    attention, feed_forward = 3 * 200 * 640 + 640 * 200 + 200, 2 * 200 * 800 + 800 + 200
    assert model.n_parameters == 16_907 * 200 + 7 * 200 + 6 * (attention + feed_forward + 800) + 400 + 7 * 201
    assert model.n_parameters == 8_388_607
    assert len(model.vocab) == model.encoder.max_len == 16_907
    assert model.layers[0].attention.projection.shape == (266, 64)


def test_missing_and_wrong_gene_lists_are_named(parity, tmp_path):
    (tmp_path / "panglao_pretrain.pth").write_bytes((parity / "panglao_pretrain.pth").read_bytes())
    with pytest.raises(ValueError, match=naming("panglao_pretrain.pth", "gene names", "vocab=")):
        models.load(tmp_path, family="scbert")
    with pytest.raises(ValueError, match=naming("panglao_pretrain.pth", "vocab=", 2)):
        models.load(tmp_path, family="scbert", vocab=["CD3E", "LYZ"])
    with pytest.raises(ValueError, match=naming("part=", "scbert")):
        models.load(parity, family="scbert", part="cell")
