"""scBERT: a Performer on all genes of a list (Yang et al., Nature Machine Intelligence 2022).

doi:10.1038/s42256-022-00534-z. Written from that paper and the Performer paper (:mod:`scllm.models.performer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scllm.data.encode import Encoder, LevelEncoder
from scllm.data.vocab import Vocab
from scllm.models.base import Batch, CellModel, Checkpoint, HeadSpec, ModelConfig, Outputs, Pooling
from scllm.models.entries import entry
from scllm.models.performer import KeyMaximum, PerformerBlock, original_names, redraw
from scllm.models.storage import gene_list, plain_weights, read_torch, renamed

__all__ = ["FINETUNE", "PRETRAIN", "SIZES", "Config", "Model", "PositionHead", "read"]

SIZES = {
    "tiny": {"n_layers": 2, "n_heads": 4, "d_model": 64, "d_head": 16, "class_hidden": 64, "class_narrow": 32},
    "small": {"n_layers": 4, "n_heads": 8, "d_model": 128, "d_head": 32, "class_hidden": 256, "class_narrow": 64},
    "base": {},
}

# a cell has 16,907 tokens, so steps have few cells
PRETRAIN = {"epochs": 6, "batch_size": 8, "lr": 1e-4}
FINETUNE = {"epochs": 10, "batch_size": 8, "lr": 1e-4}


@dataclass(frozen=True)
class Config(ModelConfig):
    """Architecture of scBERT; defaults are those of the published model.

    Parameters
    ----------
    d_head
        Width of a head; ``n_heads * d_head`` may differ from ``d_model``.
    n_levels
        Number of expression levels, including zero. The level after the highest one masks a gene.
    key_maximum
        ``"cell"``: results of a cell do not depend on its batch. ``"batch"``: as in the original, they do.
    redraw_every
        Training steps after which the Performer's random features are redrawn; ``None`` for never.
    frozen_genes
        Whether the gene table (gene2vec in the published model) is excluded from training.
    predicts_levels
        Whether there is a decoder of levels; fine-tuned published models have none.
    class_hidden, class_narrow
        Widths of the first two layers of a classification head.
    """

    n_layers: int = 6
    n_heads: int = 10
    d_model: int = 200
    dropout: float = 0.0
    d_head: int = 64
    n_levels: int = 6
    key_maximum: KeyMaximum = "cell"
    redraw_every: int | None = 1000
    frozen_genes: bool = False
    predicts_levels: bool = True
    class_hidden: int = 512
    class_narrow: int = 128

    def __post_init__(self) -> None:
        # d_head is a setting, so d_model need not be a multiple of n_heads
        if self.key_maximum not in ("cell", "batch"):
            raise ValueError(
                f"Expected key_maximum to be 'cell' or 'batch', got {self.key_maximum!r}. Pass 'cell' to keep cells "
                "independent."
            )
        self._check_blocks()

    def vocab(self, genes: Any) -> Vocab:
        """Make a vocabulary of the genes in the given order, then ``<eos>``, the last token of every cell."""
        return Vocab((*map(str, genes), "<eos>"), pad=None, mask=None, cls=None, eos="<eos>")

    def objective(self) -> dict[str, Any]:
        """Return the default pretraining objective."""
        return {"kind": "MaskedLevel", "mask_ratio": (0.15,), "replaced": 0.9}

    def encoder(self) -> Encoder:
        """Return the default encoder, which turns counts into token sequences."""
        return LevelEncoder(self.n_levels)


class Model(CellModel):
    """scBERT: level embedding + gene embedding, pre-norm blocks with linear attention, a final norm."""

    family = "scbert"
    heads_read_cells = False
    pooling: Pooling = "mean"
    poolings: tuple[Pooling, ...] = ("mean", "max")

    def __init__(self, config: Config, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        self.config: Config = config
        d = config.d_model
        self.level_embedding = nn.Embedding(config.n_levels + 1, d)
        self.gene_embedding = nn.Embedding(len(vocab), d)
        self.gene_embedding.requires_grad_(not config.frozen_genes)
        self.layers = nn.ModuleList(
            PerformerBlock(
                d, heads, config.d_head, hidden, config.dropout, qkv_bias=False, key_maximum=config.key_maximum
            )
            for heads, hidden in config.block_sizes()
        )
        self.norm = nn.LayerNorm(d)
        self.decoder = nn.Linear(d, config.n_levels + 1) if config.predicts_levels else None

    @property
    def blocks(self) -> Sequence[Any]:
        """Transformer blocks, first to last."""
        return list(self.layers)

    @property
    def hidden_level(self) -> int:
        """Level that replaces a masked one."""
        return self.config.n_levels

    def gene_table(self) -> Tensor:
        """Return the embedding of each gene (and of ``<eos>``), ``(n_tokens, d)``."""
        return self.gene_embedding.weight

    def new_head(self, n_outputs: int) -> nn.Module:
        """Make a classifier like that of the original, which reads every position."""
        widths = (self.config.class_hidden, self.config.class_narrow)
        return PositionHead(len(self.vocab), self.config.d_model, widths, n_outputs)

    def at_step(self, step: int, seed: int) -> None:
        """Redraw the random features every ``redraw_every`` steps."""
        redraw(self, step, seed, self.config.redraw_every)

    def forward_flops(self, n_tokens: float) -> float:
        """Count operations for the token sequence, which holds all genes of the vocabulary in every cell."""
        return min(len(self.vocab), self.encoder.max_len) * sum(block.flops_per_token for block in self.blocks)

    def inputs(self, batch: Batch) -> Tensor:
        """Compute the input embeddings of the first block, ``(t, d)``."""
        if batch.values is None:
            raise ValueError("Expected a level for each gene, but this batch has none. Encode with a LevelEncoder.")
        return self.level_embedding(batch.values.long()) + self.gene_embedding(batch.genes)

    def hidden(self, batch: Batch, *, layer: int = -1, first_only: bool = False) -> Tensor:
        """Compute hidden states after a block, ``(t, d)``; after the last one normalised, as decoder and heads read."""
        x = super().hidden(batch, layer=layer, first_only=first_only)
        return self.norm(x) if layer == -1 else x

    def forward(self, batch: Batch) -> Outputs:
        """Compute predictions for every token and every cell."""
        hidden = self.hidden(batch)
        heads = {} if self.decoder is None else self.decode(hidden)
        return Outputs(hidden, self.pool(hidden, batch, self.pooling), heads | self._labels(hidden, batch))

    @entry
    def decode(self, hidden: Tensor) -> dict[str, Tensor]:
        """Compute logits of levels from hidden states ``(n, d)``: ``level`` ``(n, n_levels + 1)``."""
        if self.decoder is None:
            raise ValueError(
                "This scbert model does not predict levels: fine-tuning in the original code has replaced the decoder "
                "by a classifier. Load the pretrained checkpoint."
            )
        return {"level": self.decoder(hidden)}

    def expected_level(self, hidden: Tensor) -> Tensor:
        """Compute the mean of the predicted distribution over levels, ``(n,)``."""
        levels = torch.arange(self.config.n_levels, device=hidden.device, dtype=torch.float32)
        return self.decode(hidden)["level"][:, : self.config.n_levels].float().softmax(1) @ levels

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Predict expected levels of the tokens ``at``, ``(n,)``; with ``hide``, these are masked in the input."""
        assert batch.values is not None
        if hide:
            batch = batch.with_values(batch.values.index_fill(0, at, self.hidden_level))
        return self.expected_level(self.hidden(batch)[at])

    def reconstruct_genes(self, batch: Batch, genes: Tensor) -> Tensor:
        """Predict expected levels of chosen genes, ``(b, g)``; NaN for genes that truncation removed."""
        chosen = torch.isin(batch.genes, genes)
        table = torch.full((batch.n_cells, len(self.vocab)), torch.nan, device=batch.genes.device)
        table[batch.cell[chosen], batch.genes[chosen]] = self.expected_level(self.hidden(batch)[chosen])
        return table[:, genes]

    def head_outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Compute logits (or values) of every head, by key, from the hidden states of all tokens."""
        return self._labels(self.hidden(batch), batch)

    def _labels(self, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {key: head(hidden, batch) for key, head in self.heads_on("cell").items()}


class PositionHead(nn.Module):
    """One number per position (a convolution as wide as the tokens), then three linear layers over all positions."""

    def __init__(self, n_positions: int, d_model: int, widths: tuple[int, int], n_outputs: int) -> None:
        super().__init__()
        self.n_positions = n_positions
        self.position = nn.Linear(d_model, 1)
        self.up = nn.Linear(n_positions, widths[0])
        self.narrow = nn.Linear(widths[0], widths[1])
        self.out = nn.Linear(widths[1], n_outputs)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """``(t, d)`` to ``(b, k)``; genes that truncation removed count as zero."""
        seen = F.relu(self.position(hidden)).squeeze(1)
        if batch.spacing is not None:  # a random subset of the genes stands for all of them; <eos> is always there
            seen = seen * batch.spacing[batch.cell].to(seen.dtype).masked_fill(batch.genes == self.n_positions - 1, 1)
        rows = seen.new_zeros(batch.n_cells, self.n_positions)
        rows[batch.cell, batch.genes] = seen
        return self.out(F.relu(self.narrow(F.relu(self.up(rows)))))


# --- the original's checkpoints ---

_NAMES: tuple[tuple[str, str], ...] = (
    ("token_emb.", "level_embedding."),
    ("pos_emb.emb.", "gene_embedding."),
    *original_names("performer.", "layers."),
    ("to_out.conv1.", "heads.0.position."),
    ("to_out.fc1.", "heads.0.up."),
    ("to_out.fc2.", "heads.0.narrow."),
    ("to_out.fc3.", "heads.0.out."),
    ("to_out.", "decoder."),
)
# here, the step decides when random features are redrawn
_UNUSED = ("performer.calls_since_last_redraw",)
_CHECKPOINT = "panglao_pretrain.pth"
_GENE_LISTS = ("reference_genes.json", "genes.json", "genes.txt", "vocab.json")


def read(path: str | Path, *, vocab: Vocab | None = None) -> Checkpoint:
    """Read a ``.pth`` of scBERT, or a folder with ``panglao_pretrain.pth``.

    The file contains no gene names. They come from ``vocab``, in the order that the model was trained with, or from a
    list next to the file (``reference_genes.json``, ``genes.json``, ``genes.txt``).
    """
    path = Path(path)
    file = path / _CHECKPOINT if path.is_dir() else path
    original = plain_weights(read_torch(file), file)
    weights = {renamed(name, _NAMES): tensor for name, tensor in original.items() if not name.startswith(_UNUSED)}
    if "level_embedding.weight" not in weights:
        raise ValueError(
            f"Expected weights of scBERT, but {file} has no token_emb.weight (first weight: "
            f"{next(iter(original), None)!r}). Check path and family."
        )
    has_head = "heads.0.position.weight" in weights
    if has_head:
        weights["heads.0.position.weight"] = weights["heads.0.position.weight"].flatten(0, 2)
    config = _config(weights)
    vocab = config.vocab(gene_list(file, vocab, len(weights["gene_embedding.weight"]) - 1, _GENE_LISTS))
    classes = tuple(map(str, range(len(weights["heads.0.out.bias"])))) if has_head else ()
    encoder = LevelEncoder(config.n_levels, max_len=len(vocab))
    return Checkpoint(config, vocab, encoder, weights, (HeadSpec("cls", classes),) if has_head else ())


def _config(weights: dict[str, Tensor]) -> Config:
    """Read all sizes from the shapes of the weights."""
    n_tokens, d = weights["level_embedding.weight"].shape
    d_head = weights["layers.0.attention.projection"].shape[1]
    heads: dict[str, Any] = {}
    if "heads.0.up.bias" in weights:
        heads = {"class_hidden": len(weights["heads.0.up.bias"]), "class_narrow": len(weights["heads.0.narrow.bias"])}
    return Config(
        n_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        n_heads=len(weights["layers.0.attention.query.weight"]) // d_head,
        d_model=d,
        d_head=d_head,
        n_levels=n_tokens - 1,
        frozen_genes=True,
        predicts_levels="decoder.weight" in weights,
        **heads,
    )
