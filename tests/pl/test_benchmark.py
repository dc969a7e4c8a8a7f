"""The table shows the scores."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scllm._results import record
from scllm.metrics import BATCH_METRICS, BIO_METRICS, TRANSFER_METRICS
from scllm.pl import benchmark_table

COLUMNS = [*BIO_METRICS, "bio", *BATCH_METRICS, "batch", "overall", *TRANSFER_METRICS]


@pytest.fixture
def table() -> pd.DataFrame:
    scores = np.random.default_rng(0).random((3, len(COLUMNS)))
    return pd.DataFrame(scores, index=["X_pca", "X_a", "X_b"], columns=COLUMNS)


def numbers(ax) -> dict[float, list[str]]:
    """Row -> what is written in it, from left to right."""
    written = sorted((t.get_position()[1], t.get_position()[0], t.get_text()) for t in ax.texts)
    rows: dict[float, list[str]] = {}
    for y, _, text in written:
        rows.setdefault(y, []).append(text)
    return {y: texts for y, texts in rows.items() if y > 0}


def test_every_score_is_written_best_embedding_first(table) -> None:
    ax = benchmark_table(table, show=False)
    ranked = table.sort_values("overall", ascending=False)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ranked.index.tolist()
    order = [*BIO_METRICS, *BATCH_METRICS, *TRANSFER_METRICS, "bio", "batch", "overall"]
    expected = [[f"{score:.2f}" for score in row] for row in ranked[order].to_numpy()]
    assert list(numbers(ax).values()) == expected


def test_bars_are_as_long_as_the_means(table) -> None:
    ax = benchmark_table(table, show=False)
    # a mean is a grey field with the bar on it: the narrower of two patches at one place
    at = {}
    for patch in ax.patches:
        at.setdefault(patch.get_xy(), []).append(patch.get_width())
    bars = sorted(widths[1] / widths[0] for widths in at.values() if len(widths) == 2)
    np.testing.assert_allclose(bars, np.sort(table[["bio", "batch", "overall"]].to_numpy().ravel()))


def test_best_of_a_column_is_bold(table) -> None:
    table["nmi"] = [0.9, 0.1, 0.1]
    table["ari"] = 0.5
    ax = benchmark_table(table, show=False)
    bold = {(t.get_position()[0], t.get_text()) for t in ax.texts if t.get_fontweight() == "bold"}
    assert (0.5, "0.90") in bold
    assert (1.5, "0.50") not in bold
    assert len(bold) == len(COLUMNS) - 1


def test_recorded_table_is_drawn_without_batches(table, adata) -> None:
    record(adata, "benchmark", {}, table.drop(columns=[*BATCH_METRICS, *TRANSFER_METRICS, "batch"]))
    ax = benchmark_table(adata, show=False)
    assert all(len(texts) == len(BIO_METRICS) + 1 for texts in numbers(ax).values())


def test_missing_scores_are_dashes(table) -> None:
    table["silhouette_batch"] = np.nan
    ax = benchmark_table(table, show=False)
    ax.figure.canvas.draw()
    assert all("–" in texts for texts in numbers(ax).values())


def test_other_tables_are_refused(adata) -> None:
    with pytest.raises(KeyError, match=r"Call scllm\.tl\.benchmark"):
        benchmark_table(adata, show=False)
    with pytest.raises(KeyError, match="'overall' is not a column of the table"):
        benchmark_table(pd.DataFrame({"a": [1]}), show=False)
