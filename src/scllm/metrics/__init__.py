"""Score labels and embeddings, with functions on plain arrays.

Unless stated otherwise, scores range from 0 (worst) to 1 (best). scIB below is Luecken et al., "Benchmarking
atlas-level data integration in single-cell genomics", *Nature Methods* 2022, doi:10.1038/s41592-021-01336-8.
"""

from __future__ import annotations

from scllm.metrics._bootstrap import bootstrap_interval
from scllm.metrics._calibration import expected_calibration_error, reliability, temperature
from scllm.metrics._embeddings import (
    agreement,
    batch_mixing,
    clustering_agreement,
    graph_connectivity,
    knn_accuracy,
    label_transfer,
    logistic_regression_scores,
    silhouette_batch,
    silhouette_label,
)
from scllm.metrics._expression import (
    correlation_error,
    gene_correlations,
    is_constant,
    pearson,
    spearman,
    structural_similarity,
    variance_ratio,
)
from scllm.metrics._labels import class_f1, classification_scores, confusion, mean_roc, regression_scores
from scllm.metrics._matched_null import FEWEST_NULLS, matched_null_test
from scllm.metrics._networks import directed_edges, edge_scores
from scllm.metrics._perturbation import (
    LOWER_IS_BETTER,
    PERTURBATION_METRICS,
    MeasuredChange,
    discrimination,
    perturbation_scores,
)
from scllm.metrics._sequences import permutation_bound, unigram_nats

__all__ = [
    "BATCH_METRICS",
    "BIO_METRICS",
    "BIO_WEIGHT",
    "TRANSFER_METRICS",
    "FEWEST_NULLS",
    "LOWER_IS_BETTER",
    "PERTURBATION_METRICS",
    "MeasuredChange",
    "agreement",
    "batch_mixing",
    "bootstrap_interval",
    "class_f1",
    "classification_scores",
    "clustering_agreement",
    "confusion",
    "correlation_error",
    "directed_edges",
    "discrimination",
    "edge_scores",
    "expected_calibration_error",
    "gene_correlations",
    "graph_connectivity",
    "is_constant",
    "knn_accuracy",
    "label_transfer",
    "logistic_regression_scores",
    "matched_null_test",
    "mean_roc",
    "pearson",
    "permutation_bound",
    "perturbation_scores",
    "regression_scores",
    "reliability",
    "silhouette_batch",
    "silhouette_label",
    "spearman",
    "structural_similarity",
    "temperature",
    "unigram_nats",
    "variance_ratio",
]

BIO_METRICS = ("nmi", "ari", "silhouette_label", "knn_accuracy", "logreg_accuracy", "logreg_macro_f1")
BATCH_METRICS = ("silhouette_batch", "graph_connectivity", "batch_mixing")
TRANSFER_METRICS = ("transfer_from_reference", "transfer_to_reference")
BIO_WEIGHT = 0.6
"""Weight of the bio mean in the overall score; the batch mean has weight 0.4 (scIB)."""
