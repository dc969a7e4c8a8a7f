"""Preprocessing: genes, bins, tokens, splits. Imports no torch."""

from __future__ import annotations

from scllm.pp._bin import bin_expression
from scllm.pp._match import match_genes
from scllm.pp._recipe import recipe_scgpt
from scllm.pp._split import split
from scllm.pp._tokenize import tokenize

__all__ = ["bin_expression", "match_genes", "recipe_scgpt", "split", "tokenize"]
