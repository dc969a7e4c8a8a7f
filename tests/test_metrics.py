"""Scores against worked examples and slower ways."""

from __future__ import annotations

from collections import Counter
from math import log

import numpy as np
import pandas as pd
import pytest
from messages import naming
from scipy import sparse, stats
from scipy.special import softmax
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, r2_score, roc_curve

from scllm import metrics


@pytest.fixture
def cells() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding, labels and batches of 90 cells; batch shifts the second dimension a little."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["A", "B", "C"], 30)
    batches = np.tile(["x", "y", "y"], 30)
    embedding = rng.normal(size=(90, 3))
    embedding[:, 0] += 4 * np.unique(labels, return_inverse=True)[1]
    embedding[:, 1] += batches == "y"
    return embedding, labels, batches


def silhouette_slowly(embedding: np.ndarray, labels: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(embedding[:, None] - embedding[None], axis=2)
    widths = []
    for i, own in enumerate(labels):
        mean = {k: distance[i, labels == k].sum() / ((labels == k).sum() - (k == own)) for k in set(labels)}
        a, b = mean[own], min(mean[k] for k in mean if k != own)
        widths.append((b - a) / max(a, b))
    return np.array(widths)


def knn_graph(embedding: np.ndarray, k: int) -> sparse.csr_matrix:
    distance = np.linalg.norm(embedding[:, None] - embedding[None], axis=2)
    nearest = np.argsort(distance, axis=1)[:, 1 : k + 1]
    rows = np.repeat(np.arange(len(embedding)), k)
    return sparse.csr_matrix((distance[rows, nearest.ravel()], (rows, nearest.ravel())), shape=distance.shape)


def test_classification_scores_are_those_computed_by_hand() -> None:
    truth = ["B", "B", "B", "T", "T", "NK"]
    predicted = ["B", "B", "T", "T", "T", "T"]
    found = metrics.classification_scores(truth, predicted)
    f1_b, f1_t, f1_nk = 2 * 1 * (2 / 3) / (1 + 2 / 3), 2 * 0.5 * 1 / 1.5, 0
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((f1_b + f1_t + f1_nk) / 3)


def test_unknown_is_a_miss_and_no_class() -> None:
    found = metrics.classification_scores(["B", "B", "T", "T"], ["B", "unknown", "T", "T"])
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(["a", "b", "c"], 40)
    probabilities = rng.dirichlet(np.ones(3), 40)
    areas = []
    for k, name in enumerate("abc"):
        inside, outside = probabilities[truth == name, k], probabilities[truth != name, k]
        areas.append(np.mean(inside[:, None] > outside))
    found = metrics.classification_scores(truth, truth, probabilities)
    assert found["auroc"] == pytest.approx(np.mean(areas))


def test_auroc_leaves_out_classes_without_cells() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.1, 0.9, 0.0]])
    found = metrics.classification_scores(["a", "a", "b"], ["a", "a", "b"], probabilities, classes=["a", "b", "c"])
    assert found["auroc"] == 1.0


SCORES_OF_LABELS = {
    "classification_scores": lambda truth, *given: metrics.classification_scores(truth, truth, *given),
    "bootstrap_interval": lambda truth, *given: metrics.bootstrap_interval(truth, truth, *given),
    "expected_calibration_error": metrics.expected_calibration_error,
    "reliability": metrics.reliability,
    "mean_roc": metrics.mean_roc,
}


@pytest.mark.parametrize("name", SCORES_OF_LABELS)
@pytest.mark.parametrize(
    ("truth", "values"),
    [
        ([0, 1, 1, 0], ("integer", "first: 0", "string", "first: '0'", "truth.astype(str)")),
        ([False, True, True, False], ("boolean", "first: False", "string")),
        (pd.Categorical(["0", None, "1", "0"]), ("label", 1, 4)),
        (["0", "1", "1"], ("probabilities", (4, 2), 3, 2)),
    ],
    ids=["integers", "booleans", "a gap", "a label too few"],
)
def test_labels_that_do_not_go_with_the_columns_are_an_error(name, truth, values) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        SCORES_OF_LABELS[name](truth, np.eye(2)[[0, 1, 1, 0]], ["0", "1"])


@pytest.mark.parametrize("name", SCORES_OF_LABELS)
def test_labels_outside_the_classes_are_misses(name) -> None:
    SCORES_OF_LABELS[name](["x", "y", "x", "y"], np.eye(2)[[0, 1, 1, 0]], ["0", "1"])
    assert metrics.expected_calibration_error(["x", "y"], np.eye(2), ["0", "1"]) == 1


def test_confusion_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice(["a", "b"], 50), rng.choice(["a", "b", "z"], 50)
    pairs = Counter(zip(truth, predicted))
    found = metrics.confusion(truth, predicted, rows=["b", "a"], columns=["z", "a", "b"])
    assert found.tolist() == [[pairs[row, column] for column in "zab"] for row in "ba"]


def test_best_clustering_is_the_one_with_the_highest_nmi() -> None:
    labels = ["a", "a", "a", "b", "b", "b"]
    coarse, right, fine = [0] * 6, [1, 1, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5]
    assert metrics.clustering_agreement([coarse, right, fine], labels) == (pytest.approx(1), pytest.approx(1))
    nmi, ari = metrics.clustering_agreement([coarse, fine], labels)
    # every cell a cluster: I = H(labels) = log 2, H(clusters) = log 6; the Rand index is what chance gives
    assert nmi == pytest.approx(2 * log(2) / (log(2) + log(6)))
    assert ari == pytest.approx(0)


def test_silhouette_label_agrees_with_its_definition(cells) -> None:
    embedding, labels, _ = cells
    expected = (silhouette_slowly(embedding, labels).mean() + 1) / 2
    assert metrics.silhouette_label(embedding, labels) == pytest.approx(expected, abs=1e-9)


def test_silhouette_batch_agrees_with_its_definition(cells) -> None:
    embedding, labels, batches = cells
    inside = [silhouette_slowly(embedding[labels == k], batches[labels == k]) for k in "ABC"]
    expected = np.mean([np.mean(1 - np.abs(s)) for s in inside])
    assert metrics.silhouette_batch(embedding, labels, batches) == pytest.approx(expected, abs=1e-9)


def test_classes_of_one_batch_say_nothing_about_mixing(cells) -> None:
    embedding, labels, batches = cells
    confounded = np.where(labels == "C", "x", batches)
    both = labels != "C"
    expected = metrics.silhouette_batch(embedding[both], labels[both], batches[both])
    assert metrics.silhouette_batch(embedding, labels, confounded) == pytest.approx(expected)
    assert np.isnan(metrics.silhouette_batch(embedding, labels, labels))


def test_graph_connectivity_is_the_share_of_the_largest_component() -> None:
    # A: 0-1-2 joined and 3 apart; B: 4-5 joined only through A
    graph = sparse.csr_matrix((np.ones(4), ([0, 1, 4, 5], [1, 2, 0, 0])), shape=(6, 6))
    assert metrics.graph_connectivity(graph, list("AAAABB")) == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_batch_mixing_agrees_with_its_definition(cells) -> None:
    embedding, _, batches = cells
    graph = knn_graph(embedding, 7)

    def entropy(names) -> float:
        return -sum(n / len(names) * log(n / len(names)) for n in Counter(names).values())

    around = np.mean([entropy(batches[graph[cell].indices]) for cell in range(90)])
    assert metrics.batch_mixing(graph, batches) == pytest.approx(around / entropy(batches))


def test_batches_apart_are_not_mixed() -> None:
    embedding = np.r_[np.random.default_rng(0).normal(size=(20, 2)), np.random.default_rng(1).normal(size=(20, 2)) + 50]
    assert metrics.batch_mixing(knn_graph(embedding, 5), np.repeat(["x", "y"], 20)) == 0


def test_logistic_regression_tells_labels_from_noise(cells) -> None:
    embedding, labels, _ = cells
    shuffled = np.random.default_rng(0).permutation(labels)
    assert metrics.logistic_regression_scores(embedding, labels)["accuracy"] > 0.9
    assert metrics.logistic_regression_scores(embedding, shuffled)["accuracy"] < 0.55


def test_knn_accuracy_is_that_of_a_vote_without_the_cell_itself(cells) -> None:
    embedding, labels, _ = cells
    graph = knn_graph(embedding, 7)
    votes = [Counter(labels[graph[cell].indices]).most_common() for cell in range(90)]
    first = [min(name for name, n in found if n == found[0][1]) for found in votes]
    assert metrics.knn_accuracy(graph, labels) == pytest.approx(np.mean(np.array(first) == labels))
    assert metrics.knn_accuracy(graph, labels) > 0.9
    # each cell lies on one of the other class: its nearest other cell is always wrong
    at = np.repeat(np.arange(40.0) * 10, 2)[:, None] + np.tile([0, 0.1], 40)[:, None]
    assert metrics.knn_accuracy(knn_graph(at, 1), np.tile(["a", "b"], 40)) == 0


def blobs(n_cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embedding, labels and batches of cells in four classes, the last of which has 8 cells."""
    rng = np.random.default_rng(0)
    label = np.r_[np.repeat([0, 1, 2], (n_cells - 8) // 3 + 1)[: n_cells - 8], np.full(8, 3)]
    batch = rng.integers(0, 2, n_cells)
    embedding = rng.normal(size=(n_cells, 5))
    embedding[:, 0] += 3 * label
    embedding[:, 1] += batch
    return embedding, label, batch


def test_silhouettes_of_many_cells_are_estimated_on_a_sample_that_keeps_rare_classes(monkeypatch) -> None:
    embedding, label, batch = blobs(3000)
    of_all = metrics.silhouette_label(embedding, label), metrics.silhouette_batch(embedding, label, batch)
    seen = []
    samples = metrics._embeddings.silhouette_samples
    monkeypatch.setattr("scllm.metrics._embeddings.silhouette_samples", lambda x, y: seen.append(y) or samples(x, y))
    drawn = metrics.silhouette_label(embedding, label, max_cells=300)
    assert len(seen[0]) < 310
    assert (seen[0] == 3).sum() == 8  # all of the rare class
    assert drawn == pytest.approx(of_all[0], abs=0.02)
    assert drawn == metrics.silhouette_label(embedding, label, max_cells=300)
    seen.clear()
    drawn = metrics.silhouette_batch(embedding, label, batch, max_cells=300)
    assert sum(map(len, seen)) < 320
    assert len(seen) == 4
    assert drawn == pytest.approx(of_all[1], abs=0.02)


def test_silhouettes_of_few_cells_are_of_all(monkeypatch) -> None:
    embedding, label, _ = blobs(300)
    expected = (silhouette_slowly(embedding, label).mean() + 1) / 2
    assert metrics.silhouette_label(embedding, label, max_cells=300) == pytest.approx(expected, abs=1e-9)


@pytest.fixture
def guesses() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Truth, best label and probabilities (some of them equal) of 300 cells, and names of three classes."""
    rng = np.random.default_rng(0)
    classes = np.array(["a", "b", "c"])
    truth = rng.choice(3, 300, p=[0.6, 0.3, 0.1])
    odds = rng.gamma(1.0, size=(300, 3))
    odds[np.arange(300), truth] += 0.7
    probabilities = np.round(odds / odds.sum(axis=1, keepdims=True), 1)
    return classes[truth], classes[probabilities.argmax(axis=1)], probabilities, classes


def test_f1_of_classes_is_that_of_scikit_learn(guesses) -> None:
    truth, predicted, _, classes = guesses
    expected = f1_score(truth, predicted, average=None)
    np.testing.assert_allclose(metrics.class_f1(truth, predicted, classes), expected)
    assert np.isnan(metrics.class_f1(truth, predicted, ["a", "z"])[1])


def test_auprc_is_the_mean_average_precision(guesses) -> None:
    truth, predicted, probabilities, classes = guesses
    found = metrics.classification_scores(truth, predicted, probabilities, classes)["auprc"]
    each = [average_precision_score(truth == name, probabilities[:, k]) for k, name in enumerate(classes)]
    assert found == pytest.approx(np.mean(each))


def test_calibration_error_agrees_with_its_definition(guesses) -> None:
    truth, predicted, probabilities, classes = guesses
    confidence, right = probabilities.max(axis=1), predicted == truth
    expected = 0.0
    for m in range(15):
        cells = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if cells.any():
            expected += cells.mean() * abs(right[cells].mean() - confidence[cells].mean())
    assert metrics.expected_calibration_error(truth, probabilities, classes) == pytest.approx(expected)
    bins = metrics.reliability(truth, probabilities, classes)
    shares = bins["n_cells"] / bins["n_cells"].sum()
    assert (shares * (bins["accuracy"] - bins["confidence"]).abs()).sum() == pytest.approx(expected)


@pytest.mark.parametrize("n_bins", [0, 2.5])
def test_calibration_needs_bins(guesses, n_bins) -> None:
    truth, _, probabilities, _ = guesses
    with pytest.raises(ValueError, match=naming("n_bins", n_bins)):
        metrics.expected_calibration_error(truth, probabilities, n_bins=n_bins)


def test_value_scores_are_those_of_scikit_learn_and_scipy() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(1e3, 1, 200)
    predicted = truth + rng.normal(0.3, 0.5, 200)
    assert metrics.regression_scores(truth, predicted) == {
        "r2": pytest.approx(r2_score(truth, predicted)),
        "pearson": pytest.approx(stats.pearsonr(truth, predicted)[0]),
        "mae": pytest.approx(mean_absolute_error(truth, predicted)),
    }
    flat = metrics.regression_scores(truth, np.full(200, 1e3))
    assert np.isnan(flat["pearson"])
    assert flat["r2"] == pytest.approx(r2_score(truth, np.full(200, 1e3)))
    assert np.isnan(metrics.regression_scores(np.ones(5), np.arange(5.0))["r2"])


def test_temperature_is_the_best_of_a_fine_grid_and_finds_the_planted_one() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 4))
    p = softmax(logits, axis=1)
    labels = (p.cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)
    assert metrics.temperature(logits, labels) == pytest.approx(1, abs=0.06)
    overconfident = 3 * logits
    found = metrics.temperature(overconfident, labels)
    grid = np.exp(np.linspace(np.log(0.5), np.log(10), 2001))
    surprise = [-np.log(softmax(overconfident / t, axis=1)[np.arange(4000), labels]).mean() for t in grid]
    assert found == pytest.approx(grid[np.argmin(surprise)], rel=2e-3)
    known = np.where(np.arange(4000) < 2000, labels, -1)
    assert metrics.temperature(overconfident, known) == pytest.approx(
        metrics.temperature(overconfident[:2000], labels[:2000])
    )
    assert metrics.temperature(logits[:5], np.full(5, -1)) == 1


def test_intervals_are_quantiles_of_scores_of_drawn_cells(guesses) -> None:
    truth, predicted, probabilities, classes = guesses
    found = metrics.bootstrap_interval(truth, predicted, probabilities, classes, n_resamples=400, random_state=3)
    # the slow way: the same draws as lists of cells, scored by scikit-learn
    drawn = np.random.default_rng(3).multinomial(300, np.full(300, 1 / 300), size=400)
    cells = [np.repeat(np.arange(300), times) for times in drawn]
    slowly = [
        metrics.classification_scores(truth[rows], predicted[rows], probabilities[rows], classes) for rows in cells
    ]
    assert set(found) == set(slowly[0])
    for name, ends in found.items():
        expected = np.quantile([scores[name] for scores in slowly], [0.025, 0.975])
        np.testing.assert_allclose(ends, expected, rtol=0, atol=1e-12, err_msg=name)
    again = metrics.bootstrap_interval(truth, predicted, probabilities, classes, n_resamples=400, random_state=3)
    assert again == found


def test_intervals_sort_each_class_once_however_many_samples_are_drawn(guesses, monkeypatch) -> None:
    truth, predicted, probabilities, classes = guesses
    monkeypatch.setattr("scllm.metrics._bootstrap._RESAMPLED", 3000)  # ten samples of 300 cells at a time
    sorted_lengths = []
    argsort = np.argsort
    monkeypatch.setattr(
        np, "argsort", lambda a, *args, **how: sorted_lengths.append(len(a)) or argsort(a, *args, **how)
    )
    metrics.bootstrap_interval(truth, predicted, probabilities, classes, n_resamples=200)
    assert sorted_lengths == [300] * len(classes)


def test_intervals_of_values_are_quantiles_of_scores_of_drawn_cells() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(5, 2, 80)
    predicted = truth + rng.normal(size=80)
    found = metrics.bootstrap_interval(truth, predicted, n_resamples=200)
    drawn = np.random.default_rng(0).multinomial(80, np.full(80, 1 / 80), size=200)
    cells = [np.repeat(np.arange(80), times) for times in drawn]
    slowly = {
        "r2": [r2_score(truth[rows], predicted[rows]) for rows in cells],
        "pearson": [stats.pearsonr(truth[rows], predicted[rows])[0] for rows in cells],
        "mae": [mean_absolute_error(truth[rows], predicted[rows]) for rows in cells],
    }
    for name, scores in slowly.items():
        np.testing.assert_allclose(found[name], np.quantile(scores, [0.025, 0.975]))


def test_groups_drawn_whole_widen_the_interval() -> None:
    donor = np.repeat(np.arange(10), 50)
    right = donor % 2 == 0
    truth = np.where(np.arange(500) % 3 == 0, "a", "b")
    predicted = np.where(right, truth, "other")
    by_cell = metrics.bootstrap_interval(truth, predicted)["accuracy"]
    by_donor = metrics.bootstrap_interval(truth, predicted, groups=donor)["accuracy"]
    assert by_cell[1] - by_cell[0] < 0.1
    # ten donors, each all right or all wrong: the standard deviation of the mean of ten coins is 0.158
    assert 0.5 < by_donor[1] - by_donor[0] < 0.7


def test_mean_roc_is_the_mean_of_the_classes_curves(guesses) -> None:
    truth, _, probabilities, classes = guesses
    false, true = metrics.mean_roc(truth, probabilities, classes)
    rates = []
    for k, name in enumerate(classes):
        at, rate, _ = roc_curve(truth == name, probabilities[:, k])
        rates.append(np.interp(0.25, at, rate))
    assert true[np.flatnonzero(false == 0.25)[0]] == pytest.approx(np.mean(rates))
    assert (false[0], true[0], true[-1]) == (0, 0, 1)


def test_agreement_is_that_of_a_slow_count():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(40, 6))
    b = a + rng.normal(size=a.shape) * 0.5
    found = metrics.agreement(a, b, n_neighbors=5)
    cosine = [x @ y / (np.sqrt(x @ x) * np.sqrt(y @ y)) for x, y in zip(a, b)]
    assert found["cosine_mean"] == pytest.approx(np.mean(cosine))
    assert found["cosine_min"] == pytest.approx(min(cosine))
    shared = 0
    for cell in range(40):
        near = []
        for x in (a, b):
            distance = [np.inf if other == cell else ((x[other] - x[cell]) ** 2).sum() for other in range(40)]
            near.append(set(np.argsort(distance)[:5]))
        shared += len(near[0] & near[1])
    assert found["knn_overlap"] == pytest.approx(shared / 200)
    assert metrics.agreement(a, a) == pytest.approx({"cosine_mean": 1, "cosine_min": 1, "knn_overlap": 1})


def test_agreement_needs_the_same_cells():
    with pytest.raises(ValueError, match=naming((3, 2), (4, 2))):
        metrics.agreement(np.ones((3, 2)), np.ones((4, 2)))


def test_label_transfer_on_drawn_cells_is_close_to_that_of_all() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(["a", "b", "c"], 4000, p=[0.9, 0.09, 0.01])
    values = rng.normal(size=(4000, 3)) + 1.5 * (labels[:, None] == np.array(["a", "b", "c"]))
    halves = values[:2000], labels[:2000], values[2000:], labels[2000:]
    every = metrics.label_transfer(*halves)
    drawn = metrics.label_transfer(*halves, max_cells=500)
    assert drawn != every
    assert drawn == pytest.approx(every, abs=0.03)


def test_labels_that_the_reference_lacks_are_not_transferred() -> None:
    reference, values = np.array([[0.0], [9.0]]), np.array([[1.0], [8.0], [5.0]])
    found = metrics.label_transfer(reference, ["a", "b"], values, ["a", "a", "c"], n_neighbors=1)
    assert found == 0.5
    assert np.isnan(metrics.label_transfer(reference, ["a", "b"], values, ["c", "c", "c"]))


@pytest.fixture
def predictions() -> tuple[np.ndarray, np.ndarray]:
    """Six genes of one section: the first does not vary in truth, the second and third are predicted as constant."""
    rng = np.random.default_rng(0)
    truth = rng.gamma(2.0, 1.0, (30, 6)) @ (np.eye(6) + 0.3 * rng.random((6, 6)))
    predicted = 0.5 * truth + 0.4 * rng.normal(size=(30, 6))
    truth[:, 0] = 0.7
    predicted[:, 1] = truth[:, 1].mean()
    # means of float32 values differ in their last digits
    predicted[:, 2] = np.float32(3.1) + np.where(np.arange(30) % 2, 2.4e-7, 0)
    return truth, predicted


def test_scores_of_genes_are_those_of_slow_ways_and_constant_genes_are_told_apart(predictions) -> None:
    truth, predicted = predictions
    assert metrics.is_constant(truth).tolist() == [True] + [False] * 5
    assert metrics.is_constant(predicted).tolist() == [False, True, True, False, False, False]
    found = {
        name: getattr(metrics, name)(truth, predicted)
        for name in ("pearson", "spearman", "variance_ratio", "structural_similarity")
    }
    assert all(np.isnan(scores[0]) and np.isfinite(scores[1:]).all() for scores in found.values())
    for name in ("pearson", "spearman", "variance_ratio"):
        assert np.abs(found[name][1:3]).max() < 1e-9
    # similarity without any structure: far below that of a prediction that varies with the truth
    assert found["structural_similarity"][1:3].max() < 0.1 < found["structural_similarity"][3:].min()
    for gene in (3, 4, 5):
        t, p = truth[:, gene], predicted[:, gene]
        assert found["pearson"][gene] == pytest.approx(stats.pearsonr(t, p)[0])
        assert found["spearman"][gene] == pytest.approx(stats.spearmanr(t, p)[0])
        assert found["variance_ratio"][gene] == pytest.approx(np.var(p) / np.var(t))


def test_correlation_error_is_over_pairs_of_genes_that_vary_in_both(predictions) -> None:
    truth, predicted = predictions
    squares = [
        (np.corrcoef(predicted[:, a], predicted[:, b])[0, 1] - np.corrcoef(truth[:, a], truth[:, b])[0, 1]) ** 2
        for a, b in ((3, 4), (3, 5), (4, 5))
    ]
    assert metrics.correlation_error(truth, predicted) == pytest.approx(np.sqrt(np.mean(squares)))
    assert metrics.correlation_error(truth, truth) == 0
    assert np.isnan(metrics.correlation_error(truth, np.tile(truth.mean(0), (30, 1))))
    assert np.isnan(metrics.correlation_error(truth[:, :4], predicted[:, :4]))
