"""scGPT against outputs of the original package, and as a family of its own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from scllm import models
from scllm.data.tokens import Tokens
from scllm.engine import losses
from scllm.engine.objectives import MaskedValue
from scllm.models import scgpt, scgpt_files, storage
from scllm.models.base import Batch, HeadSpec
from scllm.models.int8 import to_int8
from scllm.models.layers import CellToGenes

CLOSE = {"atol": 2e-5, "rtol": 2e-4}


@pytest.fixture(scope="session")
def parity(shared):
    return shared / "parity" / "scgpt"


@pytest.fixture(scope="session")
def arrays(parity):
    return dict(np.load(parity / "forward.npz"))


@pytest.fixture
def model(parity):
    return models.load(parity / "checkpoint", family="scgpt")


def packed(genes, values, padding):
    """A padded batch of the original as a packed one."""
    indptr = np.concatenate([[0], np.cumsum((~padding).sum(1))])
    return Batch.from_tokens(Tokens(indptr, genes[~padding], values[~padding].astype(np.float32)))


@pytest.fixture
def inputs(arrays):
    return arrays["src"], arrays["values"], arrays["src_key_padding_mask"]


def variant(parity, model, name):
    """A model of models.json: the checkpoint's settings with the weights and arguments of the variant."""
    args = (
        json.loads((parity / "checkpoint" / "args.json").read_text())
        | json.loads((parity / "models.json").read_text())[name]
    )
    weights = {scgpt_files._ours(key): value for key, value in storage.read_torch(parity / f"model_{name}.pt").items()}
    config = scgpt_files._config(args, weights)
    built = scgpt.Model(config, model.vocab, scgpt_files._encoder(args, config))
    if "heads.0.out.weight" in weights:
        built.set_heads([HeadSpec("cls", tuple(map(str, range(len(weights["heads.0.out.weight"])))))])
    storage.load_weights(built, weights, source=name)
    return built.eval(), args


@torch.no_grad()
def test_parity_scgpt_embeddings_and_hidden_states(model, inputs, arrays):
    genes, values, padding = inputs
    batch = packed(genes, values, padding)
    real = ~padding[:3]
    n = int(real.sum())
    np.testing.assert_allclose(model.embed_genes(batch.genes)[:n], arrays["base_gene_encoder"][real], **CLOSE)
    np.testing.assert_allclose(model.value_embedding(batch.values)[:n], arrays["base_value_encoder"][real], **CLOSE)
    for key in ("base_transformer_output", "base_transformer_output_nofastpath"):
        expected = arrays[key]
        real = ~padding[: len(expected)]
        np.testing.assert_allclose(model.hidden(batch)[: real.sum()], expected[real], **CLOSE)


@torch.no_grad()
def test_parity_scgpt_predictions(model, inputs, arrays):
    genes, values, padding = inputs
    outputs = model(packed(genes, values, padding))
    np.testing.assert_allclose(outputs.heads["value"], arrays["base_mlm_output"][~padding], **CLOSE)
    np.testing.assert_allclose(outputs.heads["cell_value"], arrays["base_mvc_output"][~padding], **CLOSE)
    np.testing.assert_allclose(outputs.cell, arrays["base_cell_emb"], **CLOSE)


@torch.no_grad()
def test_parity_scgpt_pooled_embeddings(model, inputs, arrays):
    genes, values, padding = inputs
    batch = packed(genes, values, padding)
    hidden = torch.zeros(*padding.shape, model.config.d_model)
    hidden[torch.from_numpy(~padding)] = model.hidden(batch)
    weights = torch.from_numpy(np.where(padding, 0, arrays["target_values"]))
    # the original's average divides by the padded length, its weighted sum is scaled to length one
    np.testing.assert_allclose(hidden.mean(1), arrays["cell_emb_avg-pool_nopad"], **CLOSE)
    weighted = torch.nn.functional.normalize((weights[:, :, None] * hidden).sum(1), dim=1)
    np.testing.assert_allclose(weighted, arrays["cell_emb_w-pool_nopad"], **CLOSE)


@torch.no_grad()
def test_parity_scgpt_losses(model, inputs, arrays):
    genes, values, padding = inputs
    outputs = model(packed(genes, values, padding))
    target = torch.from_numpy(arrays["target_values"][~padding])
    hidden = torch.from_numpy(values[~padding] == model.config.mask_value)
    for head, key in (("value", "base_loss_mse"), ("cell_value", "base_loss_gepc")):
        loss = losses.squared_error(outputs.heads[head][hidden], target[hidden]) / hidden.sum()
        np.testing.assert_allclose(loss, arrays[key], rtol=1e-4)
    error = losses.relative_error(outputs.heads["value"][hidden], target[hidden]) / hidden.sum()
    np.testing.assert_allclose(error, arrays["base_mre"], rtol=1e-4)
    np.testing.assert_allclose(losses.elastic_similarity(outputs.cell, 0.3), arrays["base_loss_ecs"], rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["annotation", "category", "scaling"])
def test_parity_scgpt_variants(parity, model, arrays, name):
    built, _ = variant(parity, model, name)
    expected = np.load(parity / f"out_{name}.npz")
    padding = arrays["src_key_padding_mask"]
    outputs = built(packed(arrays["src"], arrays["target_values"], padding))
    np.testing.assert_allclose(outputs.heads["value"], expected["mlm_output"][~padding], **CLOSE)
    np.testing.assert_allclose(outputs.cell, expected["cell_emb"], **CLOSE)
    if "cls_output" in expected:
        np.testing.assert_allclose(outputs.heads["cls"], expected["cls_output"], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["int8", "int8_dynamic"])
def test_parity_scgpt_labels_are_those_of_int8_weights(parity, model, arrays, dtype):
    built, _ = variant(parity, model, "annotation")
    to_int8(built, dtype)
    expected, padding = np.load(parity / "out_annotation.npz")["cls_output"], arrays["src_key_padding_mask"]
    logits = built(packed(arrays["src"], arrays["target_values"], padding)).heads["cls"].numpy()
    assert (logits.argmax(1) == expected.argmax(1)).all()
    assert np.abs(logits - expected).max() < 0.05 * np.ptp(expected)


@torch.no_grad()
def test_parity_scgpt_perturbation(parity, model):
    built, _ = variant(parity, model, "perturbation")
    expected = np.load(parity / "out_perturbation.npz")
    nothing = np.zeros(expected["src"].shape, bool)  # the original pads no cell here
    flags = torch.from_numpy(expected["input_pert_flags"].ravel())
    (found,) = built.predict_perturbed(packed(expected["src"], expected["values"], nothing), flags)
    np.testing.assert_allclose(found, expected["mlm_output"].ravel(), **CLOSE)


@torch.no_grad()
def test_parity_scgpt_integration(parity, model, inputs, arrays):
    genes, values, padding = inputs
    built, args = variant(parity, model, "integration")
    expected = np.load(parity / "out_integration.npz")
    batch = packed(genes, values, padding)
    batch.obs["batch"] = torch.full((batch.n_cells,), args["batch_label"])
    outputs = built(batch)
    names = {"value": "mlm_output", "cell_value": "mvc_output"}
    for ours, theirs in names.items():
        np.testing.assert_allclose(outputs.heads[ours], expected[theirs][~padding], **CLOSE)
    for ours, theirs in {"zero": "mlm_zero_probs", "cell_zero": "mvc_zero_probs"}.items():
        np.testing.assert_allclose(outputs.heads[ours].sigmoid(), expected[theirs][~padding], **CLOSE)
    np.testing.assert_allclose(outputs.heads["batch"], expected["dab_output"], **CLOSE)
    np.testing.assert_allclose(outputs.cell, expected["cell_emb"], **CLOSE)
    target = torch.from_numpy(arrays["target_values"][~padding])
    hidden = torch.from_numpy(values[~padding] == built.config.mask_value)
    n = hidden.sum()
    ecs = losses.elastic_similarity(outputs.cell, args["ecs_threshold"])
    np.testing.assert_allclose(ecs, expected["loss_ecs"], rtol=1e-4)
    mse = losses.squared_error(outputs.heads["value"][hidden], target[hidden]) / n
    np.testing.assert_allclose(mse, expected["loss_mse"], rtol=1e-4)
    for head, key in (("zero", "loss_zero_log_prob"), ("cell_zero", "loss_gepc_zero_log_prob")):
        loss = losses.zero_likelihood(outputs.heads[head][hidden], target[hidden]) / n
        np.testing.assert_allclose(loss, expected[key], rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("style", ["concat query", "sum query"])
def test_parity_scgpt_cell_decoders(parity, arrays, style):
    name = "mvc_" + style.replace(" ", "_")
    expected = np.load(parity / f"out_{name}.npz")
    cell, genes = torch.from_numpy(expected["cell_emb"]), torch.from_numpy(expected["gene_embs"])
    decoder = CellToGenes(style, cell.shape[1], cell.shape[1], explicit_zero_prob=False)
    original = storage.read_torch(parity / f"model_{name}.pt")
    weights = {
        scgpt_files._ours(f"mvc_decoder.{key}").removeprefix("cell_decoder."): value for key, value in original.items()
    }
    storage.load_weights(decoder, weights, source=name)
    cell_of = torch.arange(len(cell)).repeat_interleave(genes.shape[1])
    predicted = decoder(cell, genes.flatten(0, 1), cell_of)["cell_value"]
    real = ~arrays["src_key_padding_mask"][: len(cell)]
    np.testing.assert_allclose(predicted.view(real.shape)[real], expected["pred"][real], **CLOSE)


def test_parity_scgpt_training_step(parity, inputs, arrays):
    genes, values, padding = inputs
    expected = np.load(parity / "train_step.npz")
    model = models.load(parity / "checkpoint", family="scgpt").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = packed(genes, values, padding)
    target = torch.from_numpy(arrays["target_values"][~padding])
    hidden = torch.from_numpy(values[~padding] == model.config.mask_value)

    def both():
        outputs = model(batch)
        return [
            losses.squared_error(outputs.heads[head][hidden], target[hidden]) / hidden.sum()
            for head in ("value", "cell_value")
        ]

    optimizer = torch.optim.Adam(model.parameters(), lr=float(expected["lr"]), eps=1e-8)
    mse, mvc = both()
    (mse + mvc).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    np.testing.assert_allclose([mse.item(), mvc.item()], [expected["loss_mse"], expected["loss_mvc"]], rtol=1e-4)
    np.testing.assert_allclose(norm, expected["grad_norm_before_clip"], rtol=1e-3)
    ours = {name: weight.grad for name, weight in model.named_parameters()}
    for name, grad_norm in zip(expected["grad_param_names"], expected["grad_norm_after_clip_per_param"], strict=True):
        found = ours[scgpt_files._ours(str(name))]
        np.testing.assert_allclose(0 if found is None else found.norm(), grad_norm, rtol=1e-3, atol=1e-7)
    optimizer.step()
    after = [loss.item() for loss in both()]
    np.testing.assert_allclose(after, [expected["loss_mse_after_step"], expected["loss_mvc_after_step"]], rtol=1e-3)


def test_parity_scgpt_folder_round_trip(model, tmp_path):
    model.save(tmp_path / "folder", format="scgpt")
    again = models.load(tmp_path / "folder", family="scgpt")
    assert (again.config, again.vocab, again.encoder) == (model.config, model.vocab, model.encoder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_parity_scgpt_both_attention_namings_read_equal(parity, model, tmp_path):
    folder = tmp_path / "native_names"
    folder.mkdir()
    for name in ("args.json", "vocab.json"):
        (folder / name).write_text((parity / "checkpoint" / name).read_text())
    weights = storage.read_torch(parity / "checkpoint" / "best_model.pt")
    torch.save({name.replace("Wqkv.", "in_proj_"): value for name, value in weights.items()}, folder / "best_model.pt")
    again = models.load(folder, family="scgpt")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_parity_scgpt_native_round_trip_is_equal_to_the_bit(model, inputs, tmp_path):
    batch = packed(*inputs)
    model.save(tmp_path / "native")
    again = models.load(tmp_path / "native")
    with torch.no_grad():
        assert torch.equal(model(batch).cell, again(batch).cell)
    assert (again.config, again.vocab, again.encoder, again.head_specs) == (
        model.config, model.vocab, model.encoder, model.head_specs,
    )  # fmt: skip


def test_weights_that_do_not_fit_are_named(model):
    weights = dict(model.state_dict())
    weights["surplus.weight"] = weights.pop("gene_norm.bias")
    with pytest.raises(ValueError, match=r"missing: gene_norm\.bias; unused: surplus\.weight"):
        storage.load_weights(model, weights, source="here")


def test_published_whole_human_size():
    with torch.device("meta"):
        model = models.build("scgpt", vocab=[f"g{i}" for i in range(60_694)])
    linear = 512 * 513
    genes, values = 60_697 * 512 + 1024, 1024 + linear + 1024
    blocks, decoders = 12 * (6 * linear + 2048), 2 * linear + 513 + linear + 512 * 512
    assert model.n_parameters == genes + values + blocks + decoders == 51_329_025


def test_eight_cells_are_learnt_by_heart():
    torch.manual_seed(0)
    model = models.build("scgpt", vocab=[f"g{i}" for i in range(24)], size="tiny", dropout=0.0)
    rng = np.random.default_rng(0)
    genes = np.concatenate([np.sort(rng.permutation(24)[:12]) for _ in range(8)])
    counts = Tokens(np.arange(0, 97, 12), genes, rng.permutation(96).astype(np.float32) + 1)
    batch = Batch.from_tokens(model.encoder(counts, model.vocab, measured=model.vocab.gene_ids), np.arange(8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    found = []
    for _ in range(200):
        loss = MaskedValue((0.5,))(model, batch, 0)
        found.append(loss.sum.item() / loss.count.item())
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[-1] < found[0] / 10


def test_category_style_hides_values_with_a_row_of_its_own():
    model = models.build("scgpt", vocab=["a", "b"], size="tiny", value_style="category")
    assert model.config.mask_value == model.config.n_value_bins - 1
    assert replace(model.config).mask_value == model.config.mask_value


@pytest.fixture
def with_skip():
    return models.build("scgpt", vocab=list("abcd"), size="tiny", pooled_skip=True).eval()


def test_pooled_skip_adds_the_normalised_weighted_mean_of_the_genes_to_cls(with_skip):
    cls = int(with_skip.vocab.ids(["<cls>"])[0])
    genes, values = np.array([cls, 0, 2, cls, 1]), np.array([0, 10, 30, 0, -1], np.float32)
    batch = Batch.from_tokens(Tokens(np.array([0, 3, 5]), genes, values))
    plain = replace(with_skip.config, pooled_skip=False)
    with torch.no_grad():
        found = with_skip.inputs(batch)
        with_skip.config = plain
        without = with_skip.inputs(batch)
        vectors = with_skip.embed_genes(batch.genes)
        expected = torch.nn.functional.layer_norm((10 * vectors[1] + 30 * vectors[2]) / 40, (64,))
    torch.testing.assert_close(found[0] - without[0], expected, atol=1e-5, rtol=1e-5)
    # the only gene of the second cell is masked
    torch.testing.assert_close(found[3:], without[3:])
    torch.testing.assert_close(found[1:3], without[1:3])


@pytest.mark.parametrize("style", ["continuous", "category"])
def test_pooled_skip_does_not_see_masked_values(style):
    model = models.build("scgpt", vocab=list("abcd"), size="tiny", pooled_skip=True, value_style=style).eval()
    cls, mask = int(model.vocab.ids(["<cls>"])[0]), model.config.mask_value
    genes, values = np.array([cls, 0, 1, 2]), np.array([0, 5, mask, 9], np.float32)
    batch = Batch.from_tokens(Tokens(np.array([0, 4]), genes, values))
    other = batch.with_genes(torch.tensor([cls, 0, 3, 2]))
    with torch.no_grad():
        torch.testing.assert_close(model.inputs(batch)[0], model.inputs(other)[0])


def test_a_model_with_pooled_skip_is_saved_and_loaded(with_skip, tmp_path):
    with_skip.save(tmp_path / "model")
    loaded = models.load(tmp_path / "model")
    assert loaded.config.pooled_skip
    assert loaded.hash() == with_skip.hash()
    with pytest.raises(ValueError, match="pooled_skip"):
        with_skip.save(tmp_path / "published", format="scgpt")
