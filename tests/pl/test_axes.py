"""Showing, returning and drawing on given axes, which all plots leave to one function; seen in ``loss_curves``."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from messages import naming

from scllm import pl
from scllm.pl import _axes

HISTORY = pd.DataFrame({"step": [1, 2], "epoch": 0, "split": "train", "loss": [2.0, 1.0]})


@pytest.fixture
def shown(monkeypatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: calls.append(1))
    return calls


def test_show_decides_between_showing_and_returning(shown) -> None:
    assert pl.loss_curves(HISTORY, show=True) is None
    assert shown == [1]
    assert pl.loss_curves(HISTORY, show=False) is not None
    assert shown == [1]


def test_without_a_screen_nothing_is_shown(shown) -> None:
    assert pl.loss_curves(HISTORY) is not None
    assert not shown


def test_with_a_screen_the_plot_is_shown(shown, monkeypatch) -> None:
    monkeypatch.setattr(_axes.mpl, "get_backend", lambda: "inline")
    assert pl.loss_curves(HISTORY) is None
    assert shown == [1]


def test_given_axes_are_drawn_on() -> None:
    _, ax = plt.subplots()
    assert pl.loss_curves(HISTORY, ax=ax, show=False) is ax
    assert len(plt.get_fignums()) == 1


def test_wrong_number_of_axes_is_named() -> None:
    _, axes = plt.subplots(1, 3)
    with pytest.raises(ValueError, match=naming("ax", 3, 1)):
        pl.loss_curves(HISTORY, ax=axes, show=False)


def test_colours_are_distinct() -> None:
    for n in (1, 8, 20):
        assert len(set(_axes.colors(n))) == n
