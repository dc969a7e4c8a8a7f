"""Plots of training, tokens, labels, perturbations, networks and benchmarks. Use scanpy to plot embeddings."""

from __future__ import annotations

from scllm.pl._benchmark import benchmark_table
from scllm.pl._classify import confusion_matrix
from scllm.pl._compress import compression
from scllm.pl._cross_validate import calibration, cv_scores, roc
from scllm.pl._grn import attention, grn
from scllm.pl._loss import loss_curves
from scllm.pl._perturb import perturbation
from scllm.pl._perturbation_table import perturbation_table
from scllm.pl._spatial import plausibility_tradeoff, spatial_prediction
from scllm.pl._tokens import bin_distribution, gene_coverage, reconstruction

__all__ = [
    "attention",
    "benchmark_table",
    "bin_distribution",
    "calibration",
    "compression",
    "confusion_matrix",
    "cv_scores",
    "gene_coverage",
    "grn",
    "loss_curves",
    "plausibility_tradeoff",
    "perturbation",
    "perturbation_table",
    "reconstruction",
    "roc",
    "spatial_prediction",
]
