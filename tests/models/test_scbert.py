"""scBERT against outputs of the original, and as a family of its own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from anndata import read_h5ad
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
    counts = match.tokens(adata.X[cells])
    return counts, model.encoder(counts, model.vocab, measured=match.measured)


def test_parity_scbert_kept_cells(parity, arrays):
    adata = read_h5ad(parity / "adata.h5ad")
    listed = set(json.loads((parity / "reference_genes.json").read_text()))
    known = adata[:, [name in listed for name in adata.var_names]]
    least = json.loads((parity / "config.json").read_text())["min_genes"]
    assert adata.obs_names[known.X.getnnz(1) >= least].tolist() == arrays["kept_cells"].tolist()


def test_parity_scbert_tokens(model, counts, arrays):
    found, tokens = encoded(model, counts)
    np.testing.assert_array_equal(tokens.values.reshape(arrays["tokens"].shape), arrays["tokens"])
    assert (tokens.genes.reshape(arrays["tokens"].shape) == np.arange(len(model.vocab))).all()
    row = np.repeat(np.arange(len(found)), found.lengths)
    np.testing.assert_allclose(model.encoder.log2(found), arrays["log2_normalised"][row, found.genes], **CLOSE)


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
    with pytest.raises(ValueError, match="replaces the decoder of levels"):
        loaded.reconstruct(packed(arrays["tokens"][:1], model.vocab), torch.tensor([0]), hide=False)


def test_parity_scbert_native_round_trip_is_equal_to_the_bit(model, arrays, tmp_path):
    batch = packed(arrays["tokens"][:3], model.vocab)
    model.save(tmp_path / "native")
    again = models.load(tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(model(batch).heads["level"], again(batch).heads["level"])
    assert (again.config, again.vocab, again.encoder) == (model.config, model.vocab, model.encoder)
