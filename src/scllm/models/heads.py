"""What reads a cell's embedding and says a label or a value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PooledHead"]


class PooledHead(nn.Module):
    """One hidden layer, as in BERT's classifier: pooler, dropout, one linear."""

    def __init__(self, d_model: int, n_outputs: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, n_outputs)

    def forward(self, cell: Tensor) -> Tensor:
        """``(b, d)`` to ``(b, k)``."""
        return self.out(self.dropout(torch.tanh(self.pooler(cell))))
