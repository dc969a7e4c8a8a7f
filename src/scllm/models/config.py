"""Settings of the architecture that all families share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from scllm.data.vocab import Vocab

__all__ = ["ModelConfig", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """How new models of a size are built and pretrained, where that differs from the family's own defaults.

    Parameters
    ----------
    model
        Fields of ``Config``.
    training
        Settings of :class:`scllm.tl.TrainConfig`.
    n_steps
        Minimum number of steps. On small data, epochs are added until it is reached.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    n_steps: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; each family adds its own fields.

    Parameters
    ----------
    block_heads, block_hidden
        Number of attention heads and width of the feed-forward layer of each block, if pruning has changed them. The
        width of a head does not change. ``None``: all blocks are as the model was built.
    zeros_stay
        Whether zero weights of linear layers stay zero in training, because pruning removed them.
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
                f"Expected d_model to be a multiple of n_heads, so that all heads have the same width, got "
                f"d_model={self.d_model} and n_heads={self.n_heads}. Change one of them."
            )
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Check the sizes of pruned blocks, and turn the lists that JSON makes of them into tuples."""
        for name in (known.name for known in fields(self)):
            sizes = getattr(self, name)
            if "block_" not in name or sizes is None:
                continue
            if not len(sizes) or min(sizes) < 1:
                raise ValueError(
                    f"Expected {name} to leave at least one head or neuron in each block, got {list(sizes)}. "
                    "Leave it out if all blocks have the same size."
                )
            object.__setattr__(self, name, tuple(sizes))

    def block_sizes(self) -> list[tuple[int, int]]:
        """Return the number of heads and the feed-forward width of each block, first to last."""
        hidden = getattr(self, "d_hidden", None) or 4 * self.d_model
        heads = self.block_heads or (self.n_heads,) * self.n_layers
        return list(zip(heads, self.block_hidden or (hidden,) * len(heads), strict=True))

    def vocab(self, genes: Iterable[str]) -> Vocab:
        """Make the vocabulary of a new model."""
        return Vocab.from_genes(genes)
