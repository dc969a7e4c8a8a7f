"""Geneformer against outputs of the original code, and as a family of its own."""

from __future__ import annotations

import json
import pickle

import anndata as ad
import numpy as np
import pytest
import torch
from forms import FORMS, stored_as
from messages import naming
from safetensors.torch import load_file

from scllm import models, pp, tl
from scllm.data import genes
from scllm.data.dictionaries import read_dictionary
from scllm.data.source import open_source
from scllm.data.tokens import Tokens
from scllm.data.vocab import Vocab
from scllm.engine.objectives import MaskedGene
from scllm.models import geneformer
from scllm.models.base import Batch
from scllm.models.int8 import to_int8

CLOSE = {"atol": 2e-5, "rtol": 2e-4}
VERSIONS = ["v1", "v2"]


@pytest.fixture(scope="session")
def parity(shared):
    return shared / "parity" / "geneformer"


@pytest.fixture(scope="session")
def cells(parity):
    return ad.read_h5ad(parity / "adata.h5ad")


@pytest.fixture(scope="session")
def of_version(parity):
    """The model of each version, with the dictionaries beside it."""
    folder = parity / "dictionaries"
    return {
        version: models.load(
            parity / f"model_{version}", family="geneformer", vocab=folder / f"token_dictionary_{version}.json"
        )
        for version in VERSIONS
    }


def sentences(model, adata):
    """What the model reads of each cell."""
    source = open_source(adata)
    match = genes.match(source.genes, model.vocab, var=source.var)
    counts = match.tokens(source.read(slice(None)))
    return model.encoder(counts, model.vocab, measured=match.measured)


def chosen(cells, ids):
    """The cells of these ids, in this order."""
    return cells[[list(cells.obs["cell_id"]).index(name) for name in ids]].copy()


def packed(ids, mask):
    """A padded batch of the original as a packed one."""
    there = mask.astype(bool)
    return Batch.from_tokens(Tokens(np.concatenate([[0], np.cumsum(there.sum(1))]), ids[there], None))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", VERSIONS)
def test_parity_geneformer_tokens(parity, cells, of_version, version, form):
    expected = {key[3:]: value for key, value in np.load(parity / "tokenized.npz").items() if key.startswith(version)}
    model, adata = of_version[version], stored_as(chosen(cells, expected["cell_id"]), form)
    tokens = sentences(model, adata)
    np.testing.assert_array_equal(tokens.lengths, expected["length"])
    offsets = expected["offsets"]
    in_tie = np.zeros(len(tokens.genes), bool)
    for cell, start, length in expected["tie_groups"]:
        in_tie[offsets[cell] + start : min(offsets[cell] + start + length, offsets[cell + 1])] = True
    # of a group that is cut at the longest sentence any part is right: the last gene may be another one
    in_tie[offsets[1:] - 1 - model.encoder.eos] |= expected["length"] == model.encoder.max_len
    differ = np.flatnonzero(tokens.genes != expected["input_ids"])
    assert in_tie[differ].all()
    strength = strengths(model, adata)
    for at in differ:
        cell = np.searchsorted(offsets, at, side="right") - 1
        ours, theirs = strength[cell][tokens.genes[at]], strength[cell][expected["input_ids"][at]]
        assert ours == pytest.approx(theirs, rel=1e-6)


def strengths(model, adata):
    """By cell and token: count over median."""
    source = open_source(adata)
    counts = genes.match(source.genes, model.vocab, var=source.var).tokens(source.read(slice(None)))
    rows = (counts.take(np.array([cell])) for cell in range(len(counts)))
    return [dict(zip(row.genes, row.values / model.encoder.medians[row.genes], strict=True)) for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_parity_geneformer_masked_genes(parity, of_version, version):
    model, expected = of_version[version], np.load(parity / f"mlm_{version}.npz")
    mask = expected["attention_mask"].astype(bool)
    batch = packed(expected["input_ids"], expected["attention_mask"])
    for layer in range(model.config.n_layers + 1):
        found = model.hidden(batch, layer=layer - model.config.n_layers - 1)
        np.testing.assert_allclose(found, expected[f"hidden_{layer}"][mask], **CLOSE)
    logits = model.gene_logits(batch, torch.arange(len(batch.genes)))
    np.testing.assert_allclose(logits.logsumexp(1), expected["logsumexp"][mask], **CLOSE)
    np.testing.assert_array_equal(logits.argmax(1), expected["argmax"][mask])
    padded = torch.zeros(*mask.shape, logits.shape[1])
    padded[torch.from_numpy(mask)] = logits
    at = expected["logits_positions"]
    np.testing.assert_allclose(padded[:, at][mask[:, at]], expected["logits"][mask[:, at]], **CLOSE)
    labels = torch.from_numpy(expected["labels"][mask])
    asked = labels >= 0
    loss = model.gene_loss(batch, asked.nonzero().squeeze(1), labels[asked]) / asked.sum()
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_parity_geneformer_embeddings(parity, cells, of_version, version):
    expected, model = np.load(parity / f"embeddings_{version}.npz"), of_version[version]
    keys = [key for key in expected if key.startswith(("cell_layer", "cls_layer")) and not key.endswith("_id")]
    assert len(keys) >= 2
    for key in keys:
        adata = chosen(cells, expected[f"{key}_cell_id"])
        mode, layer = key.split("_layer")
        pooling = "mean" if mode == "cell" else "cls"
        tl.embed(adata, model, pooling=pooling, hidden_layer=int(layer) - 1)
        np.testing.assert_allclose(adata.obsm["X_scllm"], expected[key], **CLOSE)
    own = "cell_layer0" if version == "v1" else "cls_layer0"
    adata = chosen(cells, expected[f"{own}_cell_id"])
    tl.embed(adata, model)
    np.testing.assert_allclose(adata.obsm["X_scllm"], expected[own], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_parity_geneformer_gene_embeddings(parity, cells, of_version, version):
    expected, model = np.load(parity / f"embeddings_{version}.npz"), of_version[version]
    batch = Batch.from_tokens(sentences(model, chosen(cells, expected["cell_id_in_input_order"])))
    for key in (key for key in expected if key.startswith("gene_embs_layer")):
        hidden = model.hidden(batch, layer=int(key.removeprefix("gene_embs_layer")) - 1)
        ids = torch.from_numpy(model.vocab.ids(expected["gene_names"]))
        means = torch.stack([hidden[batch.genes == token].mean(0) for token in ids])
        np.testing.assert_allclose(means, expected[key], **CLOSE)


def classifier(parity, tmp_path, kind):
    """A checkpoint of the original's classifier: the trunk of V2 with fewer positions, and the head file."""
    expected = np.load(parity / f"{kind}_classifier.npz")
    config = json.loads((parity / "model_v2" / "config.json").read_text())
    weights = load_file(parity / "model_v2" / "model.safetensors")
    trunk = {name: value for name, value in weights.items() if name.startswith("bert.")}
    places = trunk["bert.embeddings.position_embeddings.weight"][:64]
    trunk["bert.embeddings.position_embeddings.weight"] = places
    trunk |= load_file(parity / f"{kind}_classifier_head.safetensors")
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    torch.save(trunk, tmp_path / "pytorch_model.bin")
    folder = parity / "dictionaries"
    model = models.load(
        tmp_path, family="geneformer", vocab=folder / "token_dictionary_v2.json", medians=folder / "gene_median.json"
    )
    return model, packed(expected["input_ids"], expected["attention_mask"]), expected


@torch.no_grad()
def test_parity_geneformer_cell_classifier(parity, tmp_path):
    model, batch, expected = classifier(parity, tmp_path, "cell")
    np.testing.assert_allclose(model.head_outputs(batch)["cell_class"], expected["logits"], **CLOSE)
    np.testing.assert_allclose(model(batch).heads["cell_class"], expected["logits"], **CLOSE)
    with pytest.raises(ValueError, match=naming("geneformer", "predict", "pretrained")):
        model.gene_loss(batch, torch.arange(len(batch.genes)), batch.genes)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "int8_dynamic"])
def test_parity_geneformer_labels_are_those_of_int8_weights(parity, tmp_path, dtype):
    model, batch, expected = classifier(parity, tmp_path, "cell")
    to_int8(model, dtype)
    logits = model.head_outputs(batch)["cell_class"].numpy()
    assert (logits.argmax(1) == expected["logits"].argmax(1)).all()
    assert np.abs(logits - expected["logits"]).max() < 0.05 * np.ptp(expected["logits"])


@torch.no_grad()
def test_parity_geneformer_gene_classifier(parity, tmp_path):
    model, batch, expected = classifier(parity, tmp_path, "gene")
    mask = expected["attention_mask"].astype(bool)
    (spec,) = model.head_specs
    assert (spec.key, spec.level, spec.n_outputs) == ("gene_class", "gene", expected["logits"].shape[-1])
    np.testing.assert_allclose(model.gene_head_outputs(batch)["gene_class"], expected["logits"][mask], **CLOSE)
    np.testing.assert_allclose(model(batch).heads["gene_class"], expected["logits"][mask], **CLOSE)
    assert model.head_outputs(batch) == {}
    # and through both formats
    model.save(tmp_path / "native")
    model.save(tmp_path / "original", format="geneformer")
    assert "BertForTokenClassification" in (tmp_path / "original" / "config.json").read_text()
    for folder, family in (("native", None), ("original", "geneformer")):
        again = models.load(tmp_path / folder, family=family)
        assert again.head_specs == model.head_specs
        assert torch.equal(again.gene_head_outputs(batch)["gene_class"], model.gene_head_outputs(batch)["gene_class"])


@pytest.mark.parametrize("version", VERSIONS)
def test_parity_geneformer_native_round_trip_is_equal_to_the_bit(of_version, parity, tmp_path, version):
    model, expected = of_version[version], np.load(parity / f"mlm_{version}.npz")
    batch = packed(expected["input_ids"], expected["attention_mask"])
    model.save(tmp_path / "native")
    again = models.load(tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(model(batch).cell, again(batch).cell)
    assert (again.config, again.vocab, again.encoder) == (model.config, model.vocab, model.encoder)
    np.testing.assert_array_equal(again.encoder.medians, model.encoder.medians)
    (tmp_path / "native" / "extras.npz").unlink()
    with pytest.raises(ValueError, match=r"extras\.npz is missing"):
        models.load(tmp_path / "native")


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
def test_parity_geneformer_folder_is_read_by_transformers(of_version, parity, tmp_path, version):
    from transformers import BertForMaskedLM

    model, expected = of_version[version], np.load(parity / f"mlm_{version}.npz")
    model.save(tmp_path / "folder", format="geneformer")
    theirs = BertForMaskedLM.from_pretrained(tmp_path / "folder").eval()
    ids, mask = (torch.from_numpy(expected[key]) for key in ("input_ids", "attention_mask"))
    logits = theirs(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    batch = packed(expected["input_ids"], expected["attention_mask"])
    ours = model.gene_logits(batch, torch.arange(len(batch.genes)))
    np.testing.assert_allclose(ours, logits, **CLOSE)
    again = models.load(tmp_path / "folder", family="geneformer")
    assert (again.config, again.vocab, again.encoder) == (model.config, model.vocab, model.encoder)
    np.testing.assert_array_equal(again.encoder.medians, model.encoder.medians)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_parity_geneformer_classifiers_survive_the_folder(parity, tmp_path):
    for kind in ("cell", "gene"):
        model, *_ = classifier(parity, tmp_path / kind, kind)
        model.save(tmp_path / f"again_{kind}", format="geneformer")
        again = models.load(tmp_path / f"again_{kind}", family="geneformer")
        assert (again.config, again.head_specs) == (model.config, model.head_specs)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_ids_in_small_letters_with_versions_and_mapped_ones_are_summed(parity, cells, tmp_path):
    folder = parity / "dictionaries"
    for name in ("token_dictionary_v2.json", "gene_median.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    first, second, third, *_ = Vocab.read(folder / "token_dictionary_v2.json").genes
    # an id that the vocabulary does not have, and one that it has and that stands for another all the same
    mapping = {"ENSG99999999999": first, second: first, third: third}
    (tmp_path / "ensembl_mapping_extra.json").write_text(json.dumps(mapping))
    model = models.load(parity / "model_v2", family="geneformer", vocab=tmp_path / "token_dictionary_v2.json")
    adata = cells[:, :5].copy()
    adata.var["ensembl_id"] = [first.lower(), "ENSG99999999999", first + ".7", second, third]
    match = genes.match(adata.var_names, model.vocab, var=adata.var)
    assert match.column == "ensembl_id"
    assert match.token_ids.tolist() == [4, 4, 4, 4, 6]
    counts = match.tokens(open_source(adata).read(slice(None)))
    summed = adata.X.toarray()[:, :4].sum(1)
    assert counts.values[counts.genes == 4].tolist() == summed[summed > 0].tolist()
    model.save(tmp_path / "native")
    assert models.load(tmp_path / "native").vocab == model.vocab


@pytest.mark.parametrize(
    ("size", "n_tokens", "n_weights"),
    [
        ("v1-10m", 25_426, 10_288_722),
        ("v1-40m", 25_426, 39_591_250),
        ("v2-104m", 20_275, 104_386_867),
        ("v2-316m", 20_275, 316_354_867),
    ],
)
def test_published_sizes_are_those_of_bert(size, n_tokens, n_weights):
    from transformers import BertConfig, BertForMaskedLM

    config = geneformer.Config(**geneformer.SIZES[size])
    vocab = config.vocab(f"g{i}" for i in range(n_tokens - (4 if config.specials else 2)))
    theirs = BertConfig(
        vocab_size=n_tokens, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, intermediate_size=config.d_hidden,
        max_position_embeddings=config.max_len,
    )  # fmt: skip
    with torch.device("meta"):
        n_parameters = geneformer.Model(config, vocab, config.encoder()).n_parameters
        assert n_parameters == BertForMaskedLM(theirs).num_parameters() == n_weights


def tiny(n_genes=30, **config):
    torch.manual_seed(0)
    return models.build("geneformer", vocab=[f"g{i}" for i in range(n_genes)], size="tiny", max_len=64, **config)


def random_sentences(model, n_cells=8, seed=0):
    rng = np.random.default_rng(seed)
    first, last = ([2], [3]) if model.config.specials else ([], [])
    known = model.vocab.gene_ids
    rows = [np.concatenate([first, rng.permutation(known)[: rng.integers(5, 30)], last]) for _ in range(n_cells)]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Tokens(indptr, np.concatenate(rows).astype(np.int32), None)


def test_eight_cells_are_learnt_by_heart():
    model = tiny(dropout=0.0)
    batch = Batch.from_tokens(random_sentences(model), np.arange(8))
    objective = MaskedGene(p=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = objective(model, batch, 0)
        losses.append(loss.sum.item() / loss.count.item())
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 10


@torch.no_grad()
@pytest.mark.parametrize("specials", [True, False])
def test_embeddings_do_not_depend_on_the_other_cells(specials):
    model = tiny(specials=specials).eval()
    tokens = random_sentences(model)
    together = model.embed(Batch.from_tokens(tokens))
    order = np.random.default_rng(1).permutation(8)
    np.testing.assert_allclose(model.embed(Batch.from_tokens(tokens.take(order))), together[order], atol=1e-5)
    alone = [model.embed(Batch.from_tokens(tokens.take(np.array([i])))) for i in range(8)]
    np.testing.assert_allclose(torch.cat(alone), together, atol=1e-5)


@torch.no_grad()
def test_positions_matter_and_those_there_are_none_for_are_an_error():
    model = tiny().eval()
    tokens = random_sentences(model, 1)
    turned = Tokens(tokens.indptr, np.concatenate([[2], tokens.genes[1:-1][::-1], [3]]), None)
    difference = model.embed(Batch.from_tokens(tokens)) - model.embed(Batch.from_tokens(turned))
    assert difference.abs().max() > 1e-3
    with pytest.raises(ValueError, match=naming("max_len", 65, 64)):
        model.embed(Batch.from_tokens(Tokens(np.array([0, 65]), np.full(65, 5), None)))


@torch.no_grad()
@pytest.mark.parametrize("pooling", [None, "ranked", "linear"])
def test_a_cell_without_any_gene_is_embedded(pooling):
    model = tiny(specials=False).eval()
    model.set_heads([models.HeadSpec("type", ("a", "b"), pooling=pooling)])
    tokens = Tokens(np.array([0, 3, 3, 5, 5]), np.array([5, 9, 7, 8, 6]), None)
    batch = Batch.from_tokens(tokens)
    assert not model.embed(batch)[[1, 3]].any()
    assert model.head_outputs(batch)["type"].isfinite().all()
    without = Batch.from_tokens(tokens.take(np.array([0, 2])))
    np.testing.assert_allclose(model.embed(batch)[[0, 2]], model.embed(without), atol=1e-6)


@torch.no_grad()
def test_reconstruction_is_the_probability_of_the_gene_in_its_place():
    model = tiny().eval()
    batch = Batch.from_tokens(random_sentences(model, 3))
    at = torch.tensor([1, 4, 7])
    hidden = batch.with_genes(batch.genes.index_fill(0, at, model.vocab.mask_id))
    expected = model.gene_logits(hidden, at).softmax(1)[torch.arange(3), batch.genes[at]]
    np.testing.assert_allclose(model.reconstruct(batch, at, hide=True), expected, rtol=1e-5)
    assert not torch.equal(model.reconstruct(batch, at, hide=False), expected)


@pytest.fixture
def published(shared, tmp_path):
    """A tiny V1 model over the published tokens and medians, and what the published dictionary of symbols holds."""
    folder = tmp_path / "published"
    there = shared / "data" / "dictionaries"
    vocab = Vocab.read(there / "geneformer_v1_token_dictionary.json.gz")
    models.build("geneformer", vocab=vocab, size="tiny", specials=False).save(folder, format="geneformer")
    medians = (there / "geneformer_v1_gene_median.json.gz").read_bytes()
    (folder / "gene_median_dictionary.json.gz").write_bytes(medians)
    return folder, read_dictionary(there / "geneformer_v1_gene_name_to_ensembl.json.gz")


@pytest.mark.parametrize("form", ["json", "pkl"])
def test_symbols_are_known_by_the_published_dictionary_beside_the_model(published, shared, tmp_path, form):
    folder, symbols = published
    adata = ad.read_h5ad(shared / "data" / "pbmc68k_reduced_counts.h5ad")[:20].copy()
    # var_names_make_unique made this name: without a TMBIM4 beside it, it is read as that gene
    adata = adata[:, adata.var_names != "TMBIM4-1"].copy()
    adata.var = adata.var[[]]
    without = models.load(folder, family="geneformer")
    with pytest.raises(ValueError, match=rf"0 of {adata.n_vars} genes.*gene_name_id_dict"):
        tl.embed(adata, without)
    raw = json.dumps(symbols).encode() if form == "json" else pickle.dumps(symbols)
    (folder / f"gene_name_id_dict.{form}").write_bytes(raw)
    model = models.load(folder, family="geneformer")
    pp.match_genes(adata, model)
    known = [symbols.get(name) for name in adata.var_names]
    assert adata.var["token_id"].tolist() == [model.vocab.ids([gene])[0] if gene else -1 for gene in known]
    assert adata.uns["scllm"]["match_genes"]["coverage"] > 0.9
    tl.embed(adata, model)
    # as if the ids stood in the data
    named = adata[:, [gene in model.vocab for gene in known]].copy()
    named.var_names = [symbols[name] for name in named.var_names]
    tl.embed(named, without)
    np.testing.assert_array_equal(adata.obsm["X_scllm"], named.obsm["X_scllm"])
    for format in ("native", "geneformer"):
        model.save(tmp_path / format, format=format)
        again = models.load(tmp_path / format, family=None if format == "native" else "geneformer")
        assert again.vocab == model.vocab
        assert len(again.vocab.aliases) == 21_245


def test_a_symbol_of_an_old_id_is_followed_to_the_new_one(parity, tmp_path):
    for name in ("token_dictionary_v2.json", "gene_median.json"):
        (tmp_path / name).write_text((parity / "dictionaries" / name).read_text())
    first, second, *_ = Vocab.read(tmp_path / "token_dictionary_v2.json").genes
    old = "ENSG99999999999"
    (tmp_path / "ensembl_mapping_dict.json").write_text(json.dumps({old: first}))
    (tmp_path / "gene_name_id_dict.json").write_text(json.dumps({"A1": old, "b2": second, "lost": "ENSG99999999998"}))
    model = models.load(parity / "model_v2", family="geneformer", vocab=tmp_path / "token_dictionary_v2.json")
    assert model.vocab.aliases == {"A1": first, "b2": second, old: first}
    model.save(tmp_path / "written", format="geneformer")
    assert models.load(tmp_path / "written", family="geneformer").vocab == model.vocab
    (tmp_path / "gene_name_id_dict.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=naming(2, "gene_name_id_dict.json", "gene_name_id_dict.pkl")):
        models.load(parity / "model_v2", family="geneformer", vocab=tmp_path / "token_dictionary_v2.json")


def test_dictionaries_that_are_missing_or_do_not_fit_are_named(parity, tmp_path):
    with pytest.raises(FileNotFoundError, match=naming("token_dictionary*.json", "vocab=")):
        models.load(parity / "model_v1", family="geneformer")
    v1 = read_dictionary(parity / "dictionaries" / "token_dictionary_v1.json")
    with pytest.raises(FileNotFoundError, match=naming("gene_median*.json", "medians=")):
        models.load(parity / "model_v1", family="geneformer", vocab=v1)
    with pytest.raises(ValueError, match=naming(len(v1), "vocab=")):
        models.load(parity / "model_v2", family="geneformer", vocab=v1)
    with pytest.raises(ValueError, match=naming("first median: 'TP53'")):
        models.load(parity / "model_v1", family="geneformer", vocab=v1, medians={"TP53": 1.0})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=naming("model_type", "'gpt2'", "'bert'")):
        models.load(tmp_path, family="geneformer")
