"""Preprocessing: matching genes, binning, ranking, tokenising and splitting. Does not import torch."""

from __future__ import annotations

from scllm.pp._bin import bin_expression
from scllm.pp._match import match_genes
from scllm.pp._medians import gene_medians
from scllm.pp._patches import image_patches
from scllm.pp._rank import rank_expression
from scllm.pp._recipe import recipe_scgpt
from scllm.pp._spatial import spatially_variable
from scllm.pp._split import split
from scllm.pp._tokenize import tokenize

__all__ = [
    "bin_expression",
    "gene_medians",
    "image_patches",
    "match_genes",
    "rank_expression",
    "recipe_scgpt",
    "spatially_variable",
    "split",
    "tokenize",
]
