"""The lines are the history."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from messages import naming

from scllm._results import record
from scllm.pl import loss_curves
from scllm.pl._axes import GREY


@pytest.fixture
def history() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    steps = np.arange(0, 300, 3)
    train = pd.DataFrame({"step": steps, "epoch": steps // 100, "split": "train", "masked": 3 + rng.random(100)})
    validation = pd.DataFrame(
        {"step": [99, 199, 299], "epoch": [0, 1, 2], "split": "validation", "masked": [3, 2, 2.5]}
    )
    both = pd.concat([train, validation], ignore_index=True)
    both["from_cell"] = 0.5 * both["masked"] + rng.random(103) * 0.01
    both["loss"] = both["masked"] + both["from_cell"]
    return both.assign(lr=1e-4, mask_ratio=0.5, cells_per_s=100.0)


def lines(ax) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {line.get_label(): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in ax.lines}


def split(history: pd.DataFrame, name: str, term: str) -> np.ndarray:
    return history.loc[history["split"] == name, term].to_numpy()


def test_one_panel_a_term_with_both_splits(history) -> None:
    axes = loss_curves(history, show=False)
    assert [ax.get_ylabel() for ax in axes] == ["loss", "masked", "from_cell"]
    for ax in axes:
        drawn, term = lines(ax), ax.get_ylabel()
        np.testing.assert_array_equal(drawn["_logged"][1], split(history, "train", term))
        np.testing.assert_array_equal(drawn["validation"][1], split(history, "validation", term))
        np.testing.assert_array_equal(drawn["validation"][0], [99, 199, 299])


def test_thick_line_is_the_running_mean(history) -> None:
    ax = loss_curves(history, metrics=["loss"], smooth=5, show=False)
    raw = split(history, "train", "loss")
    expected = [raw[max(0, at - 2) : at + 3].mean() for at in range(len(raw))]
    np.testing.assert_allclose(lines(ax)["train"][1], expected)


def test_smooth_one_draws_what_was_logged(history) -> None:
    drawn = lines(loss_curves(history, metrics=["loss"], smooth=1, show=False))
    assert "_logged" not in drawn
    np.testing.assert_array_equal(drawn["train"][1], split(history, "train", "loss"))


def test_perplexity_is_the_exponential(history) -> None:
    ax = loss_curves(history, metrics=["loss"], perplexity=True, show=False)
    np.testing.assert_allclose(lines(ax)["validation"][1], np.exp(split(history, "validation", "loss")))
    assert ax.get_ylabel() == "perplexity (loss)"


def test_perplexity_is_drawn_of_the_loss_alone_and_for_several_runs_together(history) -> None:
    ax = loss_curves([history, history.assign(loss=history["loss"] - 1)], perplexity=True, smooth=1, show=False)
    drawn = lines(ax)
    np.testing.assert_allclose(drawn["run 1"][1], np.exp(split(history, "train", "loss")))
    np.testing.assert_allclose(drawn["run 2"][1], np.exp(split(history, "train", "loss") - 1))


def test_ring_marks_the_lowest_validation_loss_in_every_panel(history) -> None:
    # the best step is that of the loss, also where a term has its minimum elsewhere
    history.loc[history["step"] == 299, "from_cell"] = 0.0
    for ax in loss_curves(history, show=False):
        ring = next(line for label, line in zip(lines(ax), ax.lines) if label.startswith("best"))
        value = history.query("step == 199 and split == 'validation'")[ax.get_ylabel()].item()
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (199, value)
    assert "step 199" in [text.get_text() for text in ax.figure.axes[0].get_legend().get_texts()][-1]


def test_epochs_are_marked_where_they_begin(history) -> None:
    ax = loss_curves(history, metrics=["loss"], show=False)
    marks = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert marks == [102, 201]
    assert [text.get_text() for text in ax.texts] == ["epoch 1", "2"]


def test_epochs_of_sources_that_differ_in_them_are_not_marked(history) -> None:
    other = history.assign(epoch=history["step"] // 50)
    assert len(loss_curves([history, history], metrics=["loss"], show=False).texts) == 2
    assert not loss_curves([history, other], metrics=["loss"], show=False).texts


def test_many_epochs_are_thinned() -> None:
    steps = np.arange(100)
    many = pd.DataFrame({"step": steps, "epoch": steps, "split": "train", "loss": 1.0 + steps})
    assert 5 <= len(loss_curves(many, show=False).texts) <= 12


def test_a_term_that_is_the_loss_is_drawn_once(history) -> None:
    history = history.drop(columns="from_cell").assign(masked=history["loss"])
    assert loss_curves(history, show=False).get_ylabel() == "loss"


def test_every_source_draws_the_same(history, adata, tmp_path) -> None:
    history.to_json(tmp_path / "history.jsonl", orient="records", lines=True)
    record(adata, "pretrain", {}, history)
    sources = [tmp_path, str(tmp_path / "history.jsonl"), SimpleNamespace(history=history), adata]
    expected = lines(loss_curves(history, show=False)[0])
    for source in sources:
        drawn = lines(loss_curves(source, show=False)[0])
        assert drawn.keys() == expected.keys()
        np.testing.assert_allclose(drawn["train"], expected["train"])


def test_a_line_that_is_being_written_is_not_read(history, tmp_path) -> None:
    text = history.to_json(orient="records", lines=True)
    (tmp_path / "history.jsonl").write_text(text[: text.rindex('"loss"')])
    drawn = lines(loss_curves(tmp_path, metrics=["loss"], show=False))
    assert len(drawn["validation"][0]) == 2


def test_sources_are_drawn_together_under_their_names(history, tmp_path) -> None:
    run = tmp_path / "small"
    run.mkdir()
    history.to_json(run / "history.jsonl", orient="records", lines=True)
    ax = loss_curves([history, run], metrics=["loss"], show=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["run 1", "small", "validation"]
    ax = loss_curves([history, run], metrics=["loss"], labels=["a", "b"], show=False)
    assert {"a", "b"} <= lines(ax).keys()
    colours = {line.get_label(): line.get_color() for line in ax.lines}
    assert colours["a"] != colours["b"]


def test_only_terms_of_all_sources_are_drawn(history) -> None:
    axes = loss_curves([history, history.drop(columns="from_cell")], show=False)
    assert [ax.get_ylabel() for ax in axes] == ["loss", "masked"]


def test_history_without_validation_is_drawn(history) -> None:
    drawn = lines(loss_curves(history[history["split"] == "train"], metrics=["loss"], show=False))
    assert not any(label.startswith(("best", "validation")) for label in drawn)


def test_bad_sources_are_named(history, adata, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "history.jsonl")):
        loss_curves(tmp_path, show=False)
    with pytest.raises(KeyError, match=r"'pretrain' is not in adata\.uns.*scllm\.tl\.pretrain"):
        loss_curves(adata, show=False)
    with pytest.raises(KeyError, match="Did you mean 'masked'"):
        loss_curves(history, metrics=["maskd"], show=False)
    with pytest.raises(ValueError, match=naming("SimpleNamespace", "history")):
        loss_curves(SimpleNamespace(history=None), show=False)
    with pytest.raises(ValueError, match=naming("labels", 1, 2)):
        loss_curves([history, history], labels=["a"], show=False)


def test_a_single_source_has_the_name_given_and_a_metric_may_stand_alone(history) -> None:
    drawn = lines(loss_curves(history, metrics="loss", labels=["mine"], show=False))
    assert {"mine", "validation"} <= drawn.keys()
    assert "train" not in drawn
    assert loss_curves(history, metrics="masked", show=False).get_ylabel() == "masked"


def test_training_steps_are_whole_numbers():
    history = pd.DataFrame({"step": range(1, 6), "epoch": 0, "split": "train", "loss": 1.0})
    ticks = loss_curves(history, show=False).get_xticks()
    assert (ticks == ticks.round()).all()


def test_mean_prediction_is_a_level_line_in_the_panels_that_have_it(history) -> None:
    known = history.assign(mean_prediction=2.5, mean_prediction_masked=1.5)
    axes = loss_curves(known, show=False)
    assert [ax.get_ylabel() for ax in axes] == ["loss", "masked", "from_cell"]
    assert [lines(ax).get("mean prediction", (0, [None]))[1][0] for ax in axes] == [2.5, 1.5, None]
    line = next(line for line in axes[0].lines if line.get_label() == "mean prediction")
    assert (line.get_linestyle(), line.get_color()) == ("--", GREY)
    assert "mean prediction" in [text.get_text() for text in axes[0].get_legend().get_texts()]
    drawn = lines(loss_curves(known, perplexity=True, show=False))
    np.testing.assert_allclose(drawn["mean prediction"][1], np.exp(2.5))
    assert "mean prediction" not in lines(loss_curves(history, show=False)[0])


def test_mean_predictions_of_several_runs_have_one_label(history) -> None:
    # a history may lack it in some lines, and a run of an earlier version in all
    first = history.assign(mean_prediction=np.where(history["step"] < 50, np.nan, 2.5))
    ax = loss_curves([first, first, history.assign(mean_prediction=2.0), history], metrics="loss", show=False)
    levels = [line.get_ydata()[0] for line in ax.lines if line.get_label().endswith("mean prediction")]
    assert levels == [2.0, 2.5]
    assert [text.get_text() for text in ax.get_legend().get_texts()].count("mean prediction") == 1
