"""What a smaller model saves, drawn."""

from __future__ import annotations

import pandas as pd
import pytest
from messages import naming

from scllm import models, pl, tl


@pytest.fixture(scope="module")
def small():
    return tl.quantize(models.build("scgpt", vocab=[f"g{i}" for i in range(50)], size="tiny"))


def widths(axis):
    return [bar.get_width() for bar in axis.patches]


def test_bars_are_what_the_report_says(small):
    axes = pl.compression(small, show=False)
    titles = [axis.get_title(loc="left") for axis in axes]
    assert titles == ["size on disk (MB)", "GFLOP per cell", "cells per second", "cosine similarity", "kNN overlap"]
    assert widths(axes[0]) == pytest.approx(small.report["bytes_on_disk"] / 1e6)
    assert widths(axes[2]) == pytest.approx(small.report["cells_per_s"])
    assert widths(axes[3]) == pytest.approx([small.report.loc["after", "cosine_mean"]])


def test_models_folders_and_tables_are_drawn_together(small, tmp_path):
    small.save(tmp_path / "blood-int8")
    measured = small.report.assign(accuracy=[0.91, 0.9])
    axes = pl.compression([small, tmp_path / "blood-int8", measured], show=False)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["model 1", "blood-int8", "model 3"]
    assert axes[-1].get_title(loc="left") == "accuracy"
    assert widths(axes[-1]) == [0.91, 0.9]
    axes = pl.compression([small, measured], labels=["a", "b"], show=False)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b"]


def test_there_is_something_to_draw(small):
    with pytest.raises(ValueError, match=naming("source", "empty")):
        pl.compression([], show=False)
    with pytest.raises(ValueError, match=naming("['watts']", "'bytes_on_disk'")):
        pl.compression(pd.DataFrame({"watts": [1, 2]}, index=["before", "after"]), show=False)
    axis = pl.compression(small, labels="mine", show=False)[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["mine"]


def test_sources_without_a_report_are_an_error(tmp_path):
    whole = models.build("scgpt", vocab=["a", "b"], size="tiny")
    with pytest.raises(ValueError, match=naming("Model", "'before'", "'after'")):
        pl.compression(whole)
    with pytest.raises(ValueError, match=naming(tmp_path, "'before'", "'after'")):
        pl.compression(tmp_path)
    with pytest.raises(ValueError, match=naming("labels", 2, 1)):
        pl.compression(pd.DataFrame(index=["before", "after"]), labels=["a", "b"])
