"""Tools to train and use models."""

from __future__ import annotations

from scllm.engine.config import TrainConfig
from scllm.engine.lora import LoraSettings
from scllm.tl._benchmark import benchmark
from scllm.tl._classify import classify
from scllm.tl._classify_genes import classify_genes
from scllm.tl._cross_validate import cross_validate
from scllm.tl._embed import embed, embed_genes
from scllm.tl._finetune import finetune
from scllm.tl._perplexity import perplexity
from scllm.tl._pretrain import pretrain
from scllm.tl._prune import prune
from scllm.tl._quantize import quantize
from scllm.tl._reconstruct import reconstruct
from scllm.tl._transfer import transfer_labels

__all__ = [
    "LoraSettings",
    "TrainConfig",
    "benchmark",
    "classify",
    "cross_validate",
    "classify_genes",
    "embed",
    "embed_genes",
    "finetune",
    "perplexity",
    "pretrain",
    "prune",
    "quantize",
    "reconstruct",
    "transfer_labels",
]
