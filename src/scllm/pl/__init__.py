"""Plots of training, tokens, labels, benchmarks and smaller models. Use scanpy to plot embeddings."""

from __future__ import annotations

from scllm.pl._benchmark import benchmark_table
from scllm.pl._classify import confusion_matrix
from scllm.pl._compress import compression
from scllm.pl._cross_validate import calibration, cv_scores, roc
from scllm.pl._loss import loss_curves
from scllm.pl._spatial import plausibility_tradeoff, spatial_prediction
from scllm.pl._tokens import bin_distribution, gene_coverage, reconstruction

__all__ = [
    "benchmark_table",
    "bin_distribution",
    "calibration",
    "compression",
    "confusion_matrix",
    "cv_scores",
    "gene_coverage",
    "loss_curves",
    "plausibility_tradeoff",
    "reconstruction",
    "roc",
    "spatial_prediction",
]
