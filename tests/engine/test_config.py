"""Training settings: invalid ones raise an error before anything is done."""

from __future__ import annotations

import json
from dataclasses import fields
from inspect import signature

import numpy as np
import pytest
from messages import naming

from scllm.engine.config import TrainConfig


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"batch_size": "32"}, TypeError, ["'32'", "whole number"]),
        ({"warmup": "a"}, TypeError, ["'a'", "whole number"]),
        ({"epochs": 1.0}, TypeError, ["1.0", "whole number"]),
        ({"steps": True}, TypeError, ["True", "whole number"]),
        ({"random_state": 1.5}, TypeError, ["1.5", "whole number"]),
        ({"random_state": -1}, ValueError, ["-1", "0"]),
        ({"compile": "no"}, TypeError, ["'no'", "True", "False"]),
        ({"use_dropout": 0}, TypeError, ["0", "True", "False"]),
        ({"lr": "1e-4"}, TypeError, ["'1e-4'", "number"]),
        ({"gamma": None}, TypeError, ["None", "number"]),
        ({"lr": 0}, ValueError, ["0.0", "positive", "1e-4"]),
        ({"clip": float("nan")}, ValueError, ["nan", "positive", "None"]),
        ({"batch_size": 0}, ValueError, ["0", "1"]),
        ({"n_shards": 0}, ValueError, ["0", "1"]),
        ({"shuffle_cells": 0.5}, TypeError, ["0.5", "whole number"]),
        ({"group_weights": {"key": "a", "temperature": 2}}, ValueError, ["'temperature'", "2"]),
        ({"weight_decay": -0.1}, ValueError, ["-0.1", "0"]),
        ({"downsample": 1}, ValueError, ["1.0", "0"]),
        ({"schedule": "cosin"}, ValueError, ["'cosin'", "'cosine'"]),
        ({"strategy": None}, ValueError, ["None", "'ddp'", "'fsdp'"]),
    ],
)
def test_invalid_settings_are_an_error_that_names_setting_and_value(settings, error, named):
    with pytest.raises(error, match=naming(*settings, *named)):
        TrainConfig(**settings)


def test_numpy_numbers_and_integers_for_floats_are_accepted_and_stored_as_plain_numbers():
    config = TrainConfig(batch_size=np.int64(4), lr=np.float32(0.1), weight_decay=0, clip=None, downsample=0)
    assert config == TrainConfig(batch_size=4, lr=float(np.float32(0.1)), weight_decay=0.0, clip=None, downsample=0.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config = TrainConfig(group_weights={"key": "tissue", "weights": {1: np.int64(2), "lung": np.float32(1)}})
    assert config.group_weights == {"key": "tissue", "weights": {"1": 2.0, "lung": 1.0}}
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("name", "offer"), [("learning_rate", "mean 'lr'?"), ("epoch", "mean 'epochs'?"), ("dropout", "function itself")]
)
def test_an_unknown_setting_is_an_error_that_offers_the_closest(name, offer):
    with pytest.raises(TypeError, match=naming(f"'{name}'", "'epochs'", offer)):
        TrainConfig(**{name: 3})


def test_the_signature_lists_the_settings():
    assert list(signature(TrainConfig).parameters) == [field.name for field in fields(TrainConfig)]


@pytest.mark.parametrize(("name", "offer"), [("epoch", "mean 'epochs'?"), ("dropout", "function")])
def test_an_unknown_setting_in_a_file_is_an_error_that_offers_the_closest(name, offer):
    with pytest.raises(ValueError, match=naming(f"'{name}'", "'epochs'", offer)):
        TrainConfig.from_dict({name: 3})
