"""Tools to train and use models."""

from __future__ import annotations

from scllm.engine.config import TrainConfig
from scllm.engine.lora import LoraSettings
from scllm.tl._ablate_spatial import ablate_spatial
from scllm.tl._benchmark import benchmark
from scllm.tl._classify import classify
from scllm.tl._classify_genes import classify_genes
from scllm.tl._cross_validate import cross_validate
from scllm.tl._embed import embed, embed_genes
from scllm.tl._evaluate_spatial import evaluate_spatial
from scllm.tl._finetune import finetune
from scllm.tl._fit_perturbation import fit_perturbation
from scllm.tl._fit_spatial import fit_spatial
from scllm.tl._infer_grn import infer_grn
from scllm.tl._patches import embed_patches
from scllm.tl._perplexity import perplexity
from scllm.tl._perturb import perturb
from scllm.tl._predict_perturbation import predict_perturbation
from scllm.tl._predict_spatial import predict_spatial
from scllm.tl._pretrain import pretrain
from scllm.tl._prune import prune
from scllm.tl._quantize import quantize
from scllm.tl._reconstruct import reconstruct
from scllm.tl._transfer import transfer_labels

__all__ = [
    "LoraSettings",
    "TrainConfig",
    "ablate_spatial",
    "benchmark",
    "classify",
    "cross_validate",
    "classify_genes",
    "embed",
    "embed_genes",
    "embed_patches",
    "evaluate_spatial",
    "finetune",
    "fit_spatial",
    "fit_perturbation",
    "infer_grn",
    "perplexity",
    "predict_spatial",
    "perturb",
    "predict_perturbation",
    "pretrain",
    "prune",
    "quantize",
    "reconstruct",
    "transfer_labels",
]
