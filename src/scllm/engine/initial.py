"""Initial weights from the data: gene embeddings and heads."""

from __future__ import annotations

from scllm._log import details
from scllm.data.cells import CellSource
from scllm.data.genes import GeneMatch
from scllm.engine.config import Settings
from scllm.engine.gene_init import start_from_data
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
) -> None:
    """Initialise gene embeddings and heads from the training cells, as the settings say, in place."""
    if settings.gene_init == "svd":
        start_from_data(model, source, match, cells.train, random_state=settings.random_state)
    if isinstance(objective, Label) and model.heads_read_cells:
        with details():
            start_heads(model, source, match, cells, objective, device=device, random_state=settings.random_state)
