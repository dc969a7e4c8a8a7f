"""Freezing, parameter groups and the learning rate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from messages import naming

import scllm
from scllm.data import genes
from scllm.data.source import open_source
from scllm.engine.config import Settings, TrainConfig
from scllm.engine.loader import Loader
from scllm.engine.optim import freeze, learning_rate, optimizer, train_mode
from scllm.models.base import Batch, HeadSpec

SETTINGS = TrainConfig(lr=1e-2, epochs=2, batch_size=40)


def resolved(**given) -> Settings:
    """Settings with defaults in place of what is not given."""
    rest = {"batch_size": 40, "warmup": 0, "schedule": "step", "precision": "fp32", "downsample": 0.0}
    return Settings(**rest | {"gene_init": "random", "use_dropout": True, "random_state": 0} | given)


@pytest.fixture
def batch(model):
    n = 20
    genes, keys = torch.arange(n), torch.tensor([1, 2])
    return Batch(genes, torch.ones(n), torch.tensor([0, 10, n], dtype=torch.int32), (10, 10), keys)


@pytest.mark.parametrize(
    ("what", "is_kept"),
    [
        (0, lambda name: False),
        (1, lambda name: name.startswith("layers.0.")),
        ("encoder", lambda name: not name.startswith("heads.")),
        (
            ["gene_embedding.*", "layers.?.attention.*"],
            lambda name: name.startswith("gene_embedding.") or ".attention." in name,
        ),
    ],
    ids=["nothing", "one block", "encoder", "patterns"],
)
def test_frozen_weights_stay_bit_equal_and_others_change(toy, model, tmp_path, what, is_kept):
    tuned = scllm.tl.finetune(
        toy, model, key="cell_type", freeze=what, run_dir=tmp_path / "run", device="cpu", config=SETTINGS, validation=0
    )
    before, after = model.state_dict(), tuned.state_dict()
    # decoders of values are not used to predict labels
    used = [name for name in before if not name.startswith(("decoder.", "cell_decoder."))]
    assert {name for name in used if torch.equal(before[name], after[name])} == set(filter(is_kept, used))


def test_frozen_blocks_have_no_dropout(model, batch):
    freeze(model, ("gene_*", "value_embedding.*", "layers.*"))
    train_mode(model)
    assert torch.equal(model.hidden(batch), model.hidden(batch))


def test_trained_blocks_have_dropout(model, batch):
    freeze(model, 1)
    train_mode(model)
    assert not model.layers[0].training
    assert model.layers[1].training
    assert not torch.equal(model.hidden(batch), model.hidden(batch))


def test_a_block_is_frozen_in_part(model):
    freeze(model, "layers.0.attention.*")
    train_mode(model)
    assert not model.layers[0].attention.training
    assert model.layers[0].training


@pytest.mark.parametrize("family", ["scgpt", "geneformer", "scfoundation", "gpt2", "albert", "xlnet"])
def test_a_frozen_encoder_gives_the_same_states_at_every_step(toy, family):
    model = scllm.models.build(family, vocab=toy.var_names, size="tiny", dropout=0.5)
    model.set_heads([HeadSpec("cell_type", ("a", "b"), pooling=model.head_pooling)])
    source = open_source(toy)
    match = genes.match(source.genes, model.vocab)
    loader = Loader(source, np.arange(8), match, model.encoder, model.vocab, 8, training=False)
    ((batch,),) = loader.epoch(0)
    train_mode(model)
    assert not torch.equal(model.hidden(batch), model.hidden(batch))
    freeze(model, "encoder")
    train_mode(model)
    assert torch.equal(model.hidden(batch), model.hidden(batch))


def test_heads_train_above_a_frozen_encoder(model):
    model.set_heads([HeadSpec("cell_type", ("a", "b"))])
    freeze(model, "encoder")
    train_mode(model)
    assert not any(layer.training for layer in model.layers)
    assert model.heads[0].training


@pytest.mark.parametrize("what", [-1, 3])
def test_freezing_more_blocks_than_the_model_has_is_an_error(model, what):
    with pytest.raises(ValueError, match=naming("freeze", "0 to 2", what)):
        freeze(model, what)


def test_a_pattern_that_matches_no_weight_is_an_error(model):
    with pytest.raises(ValueError, match=naming("freeze", "'layer.0.*'", "'encoder'", "'layers.0.*'")):
        freeze(model, "layer.0.*")


def test_freezing_everything_is_an_error(model):
    with pytest.raises(ValueError, match=naming("freeze", "'*'", "at least one")):
        freeze(model, "*")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=naming("at least one", "frozen")):
        optimizer(model, SETTINGS)


def scales(model, config):
    """Return the factor of the learning rate and the weight decay of each trained weight."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = optimizer(model, config).param_groups
    return {names[id(w)]: (group["scale"], group["weight_decay"]) for group in groups for w in group["params"]}


def test_earlier_blocks_have_a_lower_learning_rate(model):
    model.set_heads([HeadSpec("cell_type", ("a", "b"))])
    found = {name: scale for name, (scale, _) in scales(model, resolved(lr=1.0, layer_decay=0.5)).items()}
    depths = {"heads.": 1, "decoder.": 1, "layers.1.": 0.5, "layers.0.": 0.25, "gene_": 0.125}
    depths["value_embedding."] = 0.125
    for start, scale in depths.items():
        assert {found[name] for name in found if name.startswith(start)} == {scale}, start


def test_frozen_weights_are_in_no_group(model):
    freeze(model, 1)
    assert set(scales(model, SETTINGS)) == {n for n, _ in model.named_parameters() if not n.startswith("layers.0.")}


def test_only_matrices_decay(model):
    found = scales(model, resolved(lr=1.0, weight_decay=0.1))
    for name, weight in model.named_parameters():
        assert found[name][1] == (0.1 if weight.ndim == 2 and name != "gene_embedding.weight" else 0), name


def curve(n_steps, per_epoch, **settings):
    config = resolved(lr=2.0, **settings)
    return np.array([learning_rate(step, step // per_epoch, n_steps, config) for step in range(n_steps)])


def test_the_step_schedule_is_multiplied_by_gamma_each_epoch():
    np.testing.assert_allclose(curve(12, 4, gamma=0.5), np.repeat([2, 1, 0.5], 4))


def test_cosine_falls_along_a_half_wave():
    expected = [1 + math.cos(math.pi * step / 10) for step in range(10)]
    np.testing.assert_allclose(curve(10, 5, schedule="cosine"), expected)


def test_linear_falls_in_equal_steps():
    np.testing.assert_allclose(curve(10, 5, schedule="linear"), 2 * (1 - np.arange(10) / 10))


def test_constant_stays():
    assert set(curve(10, 5, schedule="constant")) == {2}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_from_zero_and_the_schedule_takes_over(schedule):
    rates = curve(20, 5, schedule=schedule, warmup=4)
    np.testing.assert_allclose(rates[:4], [0.5, 1, 1.5, 2])
    np.testing.assert_allclose(rates[4:], curve(16, 5, schedule=schedule))


@pytest.mark.parametrize("schedule", ["step", "cosine", "linear", "constant"])
def test_the_learning_rate_is_positive_at_every_step(schedule):
    assert (curve(50, 10, schedule=schedule, warmup=10) > 0).all()
