"""Every AnnData key that scllm writes."""

from __future__ import annotations

__all__ = [
    "BASELINE",
    "BATCH",
    "BINNED",
    "CELL_TYPE",
    "COUNTS",
    "CROSS_VALIDATED",
    "DISTANCE",
    "EMBEDDING",
    "FOLD",
    "GENES",
    "GENE_LABEL",
    "GENE_SYMBOL",
    "GRN",
    "LABEL",
    "LOUVAIN",
    "MEDIANS",
    "MORANS_I",
    "NATS",
    "PATCHES",
    "PATCH_FEATURES",
    "PCA",
    "PERPLEXITY",
    "PERTURB",
    "PERTURBED",
    "PREDICTED",
    "PROBABILITIES",
    "PROBABILITY",
    "PROGRAMME",
    "PROGRAMMES",
    "RANKED",
    "RECONSTRUCTED",
    "REGULATOR_LEVEL",
    "SECTION",
    "SPATIAL",
    "SPATIALLY_VARIABLE",
    "SPLIT",
    "TARGET",
    "TOKENS",
    "TOKEN_ID",
    "TOKEN_VALUES",
    "TOY",
    "TOY_SPATIAL",
    "TRANSFERRED",
    "UNKNOWN",
    "UNPERTURBED",
    "UNS",
    "safe",
]

UNS = "scllm"
"""``uns["scllm"]`` holds one dict a verb: ``params`` and, where the verb makes a table, ``table``."""

COUNTS = "counts"
BINNED = "binned"
RANKED = "ranked"
RECONSTRUCTED = "reconstructed"
TARGET = "_target"
"""Suffix: ``layers["reconstructed_target"]``."""

TOKEN_ID = "token_id"
MEDIANS = "median_expression"

TOKENS = "tokens"
TOKEN_VALUES = "_values"
"""Suffix: ``obsm["tokens_values"]``."""
EMBEDDING = "X_scllm"
PROBABILITIES = "_probabilities"
"""Suffix: ``obsm["scllm_label_probabilities"]``."""

GENES = "scllm_genes"
GENE_LABEL = "gene_label"

SPLIT = "split"
LABEL = "scllm_label"
PROBABILITY = "_prob"
"""Suffix: ``obs["scllm_label_prob"]``."""
DISTANCE = "_distance"
"""Suffix: ``obs["scllm_label_distance"]``, the distance to the known cells."""

UNKNOWN = "unknown"
"""No key: the label of cells that are too far from the known cells, or that no class is probable enough for."""

CROSS_VALIDATED = "_cv"
"""Suffix: ``obs["cell_type_cv"]``."""
BASELINE = "_baseline"
"""Suffix: ``obs["cell_type_cv_baseline"]``."""
FOLD = "_fold"
"""Suffix: ``obs["cell_type_cv_fold"]``."""
TRANSFERRED = "_transferred"
"""Suffix: ``obs["cell_type_transferred"]``."""

PERTURB = "perturb"
PERTURBED = "X_scllm_"
"""Prefix: ``obsm["X_scllm_perturb"]``."""
UNPERTURBED = "_before"
"""Suffix: ``obsm["X_scllm_perturb_before"]``."""
PREDICTED = "predicted"
GRN = "grn"
PROGRAMME = "_programme"
"""Suffix: ``var["grn_programme"]``."""

PERPLEXITY = "perplexity"
NATS = "_nats"
"""Suffix: ``obs["perplexity_nats"]``."""

MORANS_I = "morans_i"
SPATIALLY_VARIABLE = "spatially_variable"
PATCHES = "patches"
PATCH_FEATURES = "X_patch"
SPATIAL = "spatial"
"""scanpy's: positions of spots in ``obsm``, images of sections in ``uns``."""

BATCH = "batch"
CELL_TYPE = "cell_type"
LOUVAIN = "louvain"
GENE_SYMBOL = "gene_symbol"
REGULATOR_LEVEL = "regulator_level"
PCA = "X_pca"
"""scanpy's: read as the yardstick of ``benchmark``, never written."""
SECTION = "section"
PROGRAMMES = "programmes"
TOY = "toy"
"""``uns["toy"]``: what was planted in the toy data."""
TOY_SPATIAL = "toy_spatial"
"""``uns["toy_spatial"]``: what was planted in the toy sections."""


def safe(name: str) -> str:
    """``name`` as a key that every file format takes: a ``/`` would be a folder, which cannot be read back."""
    return name.replace("/", "_")
