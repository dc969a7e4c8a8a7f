"""The architecture that every family's configuration begins with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from scllm.data.vocab import Vocab

__all__ = ["ModelConfig"]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; each family adds its own fields.

    Parameters
    ----------
    block_heads, block_hidden
        Heads and width of the feed-forward layer of each block, where pruning has left other numbers than the model was
        built with; heads keep their width.
    zeros_stay
        Whether weights of linear layers that are zero stay zero in training: pruning took them out.
    """

    n_layers: int = 12
    n_heads: int = 8
    d_model: int = 512
    dropout: float = 0.1
    block_heads: tuple[int, ...] | None = None
    block_hidden: tuple[int, ...] | None = None
    zeros_stay: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; every head needs the same width. "
                "Change one of them."
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Blocks of their own size come in pairs of numbers; JSON makes lists of them."""
        for field in fields(self):
            sizes = getattr(self, field.name)
            if "block_" not in field.name or sizes is None:
                continue
            if not len(sizes) or min(sizes) < 1:
                raise ValueError(
                    f"{field.name} is {list(sizes)}, at least one head or neuron in each block expected. Leave it out "
                    "for blocks of one size."
                )
            object.__setattr__(self, field.name, tuple(sizes))

    def block_sizes(self) -> list[tuple[int, int]]:
        """Heads and width of the feed-forward layer of each block, first to last."""
        hidden = getattr(self, "d_hidden", None) or 4 * self.d_model
        heads = self.block_heads or (self.n_heads,) * self.n_layers
        return list(zip(heads, self.block_hidden or (hidden,) * len(heads), strict=True))

    def vocab(self, genes: Iterable[str]) -> Vocab:
        """The vocabulary of a model from scratch."""
        return Vocab.from_genes(genes)
