"""Training settings: what is none of them is said before anything is done."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from scllm.engine.config import TrainConfig


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_size": "32"}, TypeError, r"batch_size is '32', a whole number expected\. Pass batch_size="),
        ({"warmup": "a"}, TypeError, "warmup is 'a', a whole number expected"),
        ({"epochs": 1.0}, TypeError, r"epochs is 1\.0, a whole number expected"),
        ({"steps": True}, TypeError, "steps is True, a whole number expected"),
        ({"random_state": 1.5}, TypeError, r"random_state is 1\.5, a whole number expected"),
        ({"random_state": -1}, ValueError, "random_state is -1, 0 or more expected"),
        ({"compile": "no"}, TypeError, "compile is 'no', True or False expected"),
        ({"use_dropout": 0}, TypeError, "use_dropout is 0, True or False expected"),
        ({"lr": "1e-4"}, TypeError, "lr is '1e-4', a number expected"),
        ({"gamma": None}, TypeError, "gamma is None, a number expected"),
        ({"lr": 0}, ValueError, r"lr is 0\.0, a positive number expected\. scGPT uses 1e-4"),
        ({"clip": float("nan")}, ValueError, "clip is nan, a positive number expected"),
        ({"batch_size": 0}, ValueError, "batch_size is 0, at least 1 expected"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay is -0\.1, 0 or more expected"),
        ({"downsample": 1}, ValueError, r"downsample is 1\.0, a share from 0 up to below 1 expected"),
        ({"schedule": "cosin"}, ValueError, "schedule is 'cosin', one of .* expected"),
        ({"strategy": None}, ValueError, "strategy is None, one of .* expected"),
    ],
)
def test_settings_that_are_none_are_an_error(settings, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**settings)


def test_numbers_of_numpy_and_whole_numbers_for_others_are_taken_and_kept_as_plain_ones():
    config = TrainConfig(batch_size=np.int64(4), lr=np.float32(0.1), weight_decay=0, clip=None, downsample=0)
    assert config == TrainConfig(batch_size=4, lr=float(np.float32(0.1)), weight_decay=0.0, clip=None, downsample=0.0)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("name", "offer"), [("epoch", "Did you mean 'epochs'?"), ("dropout", "is given to the verb")])
def test_an_unknown_setting_of_a_file_is_an_error_that_offers_the_closest(name, offer):
    with pytest.raises(
        ValueError, match=f"'{name}' is not a training setting, one of .* expected. .*{re.escape(offer)}"
    ):
        TrainConfig.from_dict({name: 3})
