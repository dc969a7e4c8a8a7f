"""Initial weights from the data: gene embeddings and heads."""

from __future__ import annotations

from scllm._log import details
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.data.reference import Reference
from scllm.engine.config import Settings
from scllm.engine.gene_init import (
    N_COMPONENTS,
    decompose,
    reference,
    set_gene_vectors,
    start_from_data,
    vectors_of,
)
from scllm.engine.head_start import start_heads
from scllm.engine.objectives import Label, Objective
from scllm.engine.spec import Cells
from scllm.models.base import CellModel

__all__ = ["initialise"]


def initialise(
    model: CellModel,
    source: CellSource,
    match: GeneMatch,
    cells: Cells,
    objective: Objective,
    settings: Settings,
    *,
    device: str,
) -> Reference | None:
    """Initialise gene embeddings and heads from the training cells, as the settings say, in place.

    Returns
    -------
    Principal components of the training cells for relational pretraining; ``None`` for other training.
    """
    found, seed, n_tokens = None, settings.random_state, len(model.vocab)
    if settings.relational:
        n_vectors = model.gene_table().shape[1]
        parts = decompose(source, match, cells.train, max(n_vectors, N_COMPONENTS), n_tokens, random_state=seed)
        found = reference(parts, n_tokens, thinned=settings.view_downsample == "match")
        if settings.gene_init == "svd":
            set_gene_vectors(model, vectors_of(parts, n_vectors, n_tokens))
    elif settings.gene_init == "svd":
        start_from_data(model, source, match, cells.train, random_state=seed)
    if isinstance(objective, Label) and model.heads_read_cells:
        with details():
            start_heads(model, source, match, cells, objective, device=device, random_state=seed)
    return found
