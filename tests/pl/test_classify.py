"""The image is the confusion counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from messages import naming

from scllm.pl import confusion_matrix

PAIRS = {("T", "T"): 6, ("T", "NK"): 2, ("B", "B"): 3, ("B", "unknown"): 1, ("NK", "T"): 1, ("NK", "NK"): 1}


@pytest.fixture
def labelled() -> AnnData:
    truth = [pair[0] for pair, n in PAIRS.items() for _ in range(n)]
    predicted = [pair[1] for pair, n in PAIRS.items() for _ in range(n)]
    obs = pd.DataFrame({"truth": [*truth, None], "label": [*predicted, "T"]}, index=[f"c{i}" for i in range(15)])
    return AnnData(np.zeros((15, 1), np.float32), obs=obs.astype("category"))


def names(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_counts_are_those_counted_by_hand(labelled) -> None:
    ax = confusion_matrix(labelled, truth="truth", predicted="label", normalize=False, show=False)
    assert names(ax.get_yticklabels()) == ["T (8)", "B (4)", "NK (2)"]
    assert names(ax.get_xticklabels()) == ["T", "B", "NK", "unknown"]
    expected = [[PAIRS.get((row, column), 0) for column in ["T", "B", "NK", "unknown"]] for row in ["T", "B", "NK"]]
    assert ax.images[0].get_array().tolist() == expected
    numbers = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
    assert numbers == {(r, c): str(n) for r, row in enumerate(expected) for c, n in enumerate(row) if n}


def test_rows_are_percentages(labelled) -> None:
    ax = confusion_matrix(labelled, truth="truth", predicted="label", show=False)
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown.sum(axis=1), 100)
    assert shown[0].tolist() == [75, 0, 25, 0]


def test_long_names_leave_room_for_the_fields(labelled) -> None:
    long = "naive thymus-derived CD8-positive, alpha-beta T cell"
    labelled.obs = labelled.obs.astype(object).replace({"T": long}).astype("category")
    ax = confusion_matrix(labelled, truth="truth", predicted="label", show=False)
    ax.figure.canvas.draw()
    inches = np.array(ax.get_window_extent().size) / ax.images[0].get_array().shape[::-1] / ax.figure.dpi
    assert (inches > 0.4).all()
    for label in [*ax.get_xticklabels(), *ax.get_yticklabels()]:
        assert ax.figure.bbox.contains(*label.get_window_extent().min)


def test_similar_types_stand_side_by_side() -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(["a", "b", "c", "d"], [50, 40, 30, 20])
    # a and d are taken for each other, as are b and c
    other = {"a": "d", "d": "a", "b": "c", "c": "b"}
    predicted = np.where(rng.random(140) < 0.4, [other[name] for name in truth], truth)
    obs = pd.DataFrame({"truth": truth, "label": predicted}, index=[f"c{i}" for i in range(140)])
    adata = AnnData(np.zeros((140, 1), np.float32), obs=obs)
    ax = confusion_matrix(adata, truth="truth", predicted="label", order="similarity", show=False)
    order = names(ax.get_xticklabels())
    assert abs(order.index("a") - order.index("d")) == 1
    assert abs(order.index("b") - order.index("c")) == 1
    shown = ax.images[0].get_array()
    for row, name in enumerate(order):
        assert shown[row, row] == pytest.approx(100 * np.mean(predicted[truth == name] == name))


def test_bad_columns_are_named(labelled) -> None:
    with pytest.raises(KeyError, match="Did you mean 'label'"):
        confusion_matrix(labelled, truth="truth", predicted="lable", show=False)
    labelled.obs["none"] = pd.Categorical([None] * 15)
    with pytest.raises(ValueError, match=naming("obs['truth']", "obs['none']")):
        confusion_matrix(labelled, truth="truth", predicted="none", show=False)


def test_values_are_no_labels(labelled) -> None:
    labelled.obs["depth"] = np.linspace(0, 1, 15)
    with pytest.raises(ValueError, match=naming("obs['depth']", "float64", ".astype('category')")):
        confusion_matrix(labelled, truth="truth", predicted="depth", show=False)
    with pytest.raises(KeyError, match=r"None is not a column of adata\.obs"):
        confusion_matrix(labelled, truth="truth", predicted=None, show=False)


def test_an_unknown_order_is_named(labelled) -> None:
    with pytest.raises(ValueError, match=naming("order", "'similar'", "'size'", "'similarity'")):
        confusion_matrix(labelled, truth="truth", predicted="label", order="similar", show=False)
