"""Geneformer: BERT on genes ranked by expression (Theodoris et al. 2023, doi:10.1038/s41586-023-06139-9)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scllm.data.encode import Encoder, RankEncoder
from scllm.data.vocab import Vocab
from scllm.models.base import Batch, CellModel, Checkpoint, ModelConfig, Outputs, Pooling
from scllm.models.geneformer_files import MedianLike, VocabLike, read_folder, write
from scllm.models.layers import Block, linear_cross_entropy
from scllm.models.places import places

__all__ = ["FINETUNE", "PRETRAIN", "SIZES", "Config", "Model", "read"]

_V1 = {"specials": False, "dropout": 0.02}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"n_layers": 2, "n_heads": 4, "d_model": 64, "d_hidden": 128},
    "small": {"n_layers": 4, "n_heads": 4, "d_model": 128, "d_hidden": 256},
    "base": {},
    "v1-10m": _V1,
    "v1-40m": {**_V1, "n_layers": 12, "n_heads": 8, "d_model": 512, "d_hidden": 1024},
    "v2-104m": {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_hidden": 3072, "dropout": 0.1, "max_len": 4096},
    "v2-316m": {"n_layers": 18, "n_heads": 18, "d_model": 1152, "d_hidden": 4608, "dropout": 0.1, "max_len": 4096},
}

# The published learning rate, but without 10,000 warm-up steps, because one study has only a few thousand steps.
# The gene table is initialised from the data, in the original at random: after twelve epochs on 560 blood cells the
# loss is the same, and clusters of the mean embedding agree with cell types at an NMI of 0.66 instead of 0.33.
PRETRAIN = {"epochs": 6, "batch_size": 32, "lr": 1e-3}
# the head is fitted beforehand (engine/head_start.py), and higher learning rates would first undo that
FINETUNE = {"epochs": 3, "batch_size": 32, "lr": 3e-5}


@dataclass(frozen=True)
class Config(ModelConfig):
    """Architecture of Geneformer; defaults are those of the published 6-layer model, with ``<cls>`` and ``<eos>``.

    Parameters
    ----------
    d_hidden
        Width of the feed-forward layers.
    max_len
        Longest token sequence; each rank has a learned position.
    specials
        Whether token sequences are between ``<cls>`` and ``<eos>`` (V2).
    lm_head
        Whether the model predicts masked genes; fine-tuned checkpoints of the original do not.
    """

    n_layers: int = 6
    n_heads: int = 4
    d_model: int = 256
    dropout: float = 0.02
    d_hidden: int = 512
    max_len: int = 2048
    specials: bool = True
    lm_head: bool = True

    def objective(self) -> dict[str, Any]:
        """Return the default pretraining objective."""
        return {"kind": "MaskedGene", "p": 0.15}

    def encoder(self) -> Encoder:
        """Return the default encoder; pretraining a new model adds the medians of its cells."""
        return RankEncoder(self.max_len, cls=self.specials, eos=self.specials)

    def vocab(self, genes: Iterable[str]) -> Vocab:
        """Make a vocabulary with special tokens first, as in the published dictionaries."""
        if self.specials:
            return Vocab(("<pad>", "<mask>", "<cls>", "<eos>", *map(str, genes)), eos="<eos>")
        return Vocab(("<pad>", "<mask>", *map(str, genes)), cls=None)


class Model(CellModel):
    """BERT (Devlin et al. 2019): learned positions, post-norm blocks, output tied to the gene table."""

    family = "geneformer"
    head_pooling = "linear"
    likelihood = "pseudo"
    config: Config

    def __init__(self, config: Config, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        # V1 has no <cls>, so its embedding is the mean over genes
        self.pooling: Pooling = "cls" if config.specials else "mean"
        self.poolings = tuple(how for how in type(self).poolings if config.specials or how != "cls")
        d = config.d_model
        self.token_embedding = nn.Embedding(len(vocab), d)
        self.position_embedding = nn.Embedding(config.max_len, d)
        self.type_embedding = nn.Embedding(2, d)
        self.norm = nn.LayerNorm(d, 1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            Block(d, heads, hidden, config.dropout, norm_eps=1e-12, inner=False, d_head=d // config.n_heads)
            for heads, hidden in config.block_sizes()
        )
        self.predictor = GenePredictor(d, len(vocab)) if config.lm_head else None
        self.apply(_initialise)

    @property
    def blocks(self) -> Sequence[Any]:
        """Transformer blocks, first to last."""
        return list(self.layers)

    def gene_table(self) -> Tensor:
        """Return the embedding of each token before its position is added, ``(n_tokens, d)``."""
        return self.token_embedding.weight

    def new_head(self, n_outputs: int) -> nn.Module:
        """Make the original's classifier, initialised by PyTorch: with BERT's std of 0.02 small models hardly learn."""
        return PooledHead(self.config.d_model, n_outputs, self.config.dropout)

    def inputs(self, batch: Batch) -> Tensor:
        """Compute the input embeddings of the first block, ``(t, d)``."""
        if max(batch.lengths, default=0) > self.config.max_len:
            raise ValueError(
                f"Expected at most {self.config.max_len} tokens per cell, the number of positions of the model, got "
                f"{max(batch.lengths)}. Encode with a smaller max_len."
            )
        position = self.position_embedding(places(batch, cast(RankEncoder, self.encoder)))
        x = self.token_embedding(batch.genes) + self.type_embedding.weight[0] + position
        return self.dropout(self.norm(x))

    def forward(self, batch: Batch) -> Outputs:
        """Compute hidden states of tokens, embeddings of cells, and predictions of the heads."""
        hidden = self.hidden(batch)
        heads = {key: head(hidden) for key, head in self.heads_on("gene").items()}
        return Outputs(hidden, self.pool(hidden, batch, self.pooling), heads | self.head_outputs_after(hidden, batch))

    def head_inputs(self, batch: Batch) -> Tensor:
        """Compute the inputs of the heads for each cell, ``(b, d)``."""
        if self._head_pooling is not None:
            return super().head_inputs(batch)
        if self.config.specials:
            return self.hidden(batch, first_only=True)
        return self.head_state(self.hidden(batch), batch)

    def gene_logits(self, batch: Batch, at: Tensor) -> Tensor:
        """Compute logits of the tokens at positions ``at``, ``(n, n_tokens)``, from all tokens of the batch."""
        return self._logits(self.hidden(batch)[at])

    def gene_loss(self, batch: Batch, at: Tensor, genes: Tensor) -> Tensor:
        """Sum the cross-entropy (nats) of ``genes`` ``(n,)`` at positions ``at``, from all tokens of the batch."""
        predictor = self._predictor()
        states = predictor(self.hidden(batch)[at])
        return linear_cross_entropy(states, self.token_embedding.weight, predictor.bias, genes)

    def _logits(self, states: Tensor) -> Tensor:
        predictor = self._predictor()
        return F.linear(predictor(states), self.token_embedding.weight, predictor.bias)

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Compute the probability of the genes at ``at``, ``(n,)``; with ``hide``, these are masked in the input."""
        shown = batch.with_genes(batch.genes.index_fill(0, at, self.vocab.mask_id)) if hide else batch
        states, genes = self.hidden(shown)[at], batch.genes[at]
        n = 1024  # three copies of the logits of the whole vocabulary are held here
        parts = zip(states.split(n), genes.split(n), strict=True)
        found = [self._logits(part).float().softmax(1).gather(1, of[:, None])[:, 0] for part, of in parts]
        return torch.cat(found) if found else states.new_zeros(0)

    def _predictor(self) -> GenePredictor:
        if self.predictor is None:
            raise ValueError(
                "This geneformer model does not predict genes, because its checkpoint was fine-tuned for labels. Load "
                "a pretrained one."
            )
        return self.predictor

    def head_state(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Pool hidden states for heads, ``(b, d)``; published heads read the first token, ``<cls>`` or the top gene."""
        if self._head_pooling is not None:
            return self.pool(hidden, batch, self._head_pooling)
        if not len(hidden):
            return hidden.new_zeros(batch.n_cells, hidden.shape[1])
        # without <cls> a cell may have no tokens; its state is then zero
        there = torch.tensor(batch.lengths, device=hidden.device) > 0
        return torch.where(there[:, None], hidden[batch.first.clamp(max=len(hidden) - 1)], 0)

    def write_original(self, path: Path) -> None:
        """Write a Hugging Face folder that includes the dictionaries."""
        write(self, path)


class PooledHead(nn.Module):
    """Classifier with one hidden layer, as in BERT: pooler, dropout, linear."""

    def __init__(self, d_model: int, n_outputs: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(d_model, n_outputs)

    def forward(self, cell: Tensor) -> Tensor:
        """``(b, d)`` to ``(b, k)``."""
        return self.out(self.dropout(torch.tanh(self.pooler(cell))))


def read(path: str | Path, vocab: VocabLike | None = None, medians: MedianLike | None = None) -> Checkpoint:
    """Read a Hugging Face folder of BERT, with its token dictionary and gene medians in the folder or passed."""
    settings, tokens, encoder, weights, heads = read_folder(Path(path), vocab, medians)
    return Checkpoint(Config(**settings), tokens, encoder, weights, heads)


class GenePredictor(nn.Module):
    """Layers between the last block and the output, whose weights are the gene table."""

    def __init__(self, d_model: int, n_tokens: int) -> None:
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, 1e-12)
        self.bias = nn.Parameter(torch.zeros(n_tokens))

    def forward(self, states: Tensor) -> Tensor:
        """``(n, d)`` to ``(n, d)``."""
        return self.norm(F.relu(self.dense(states)))


def _initialise(module: nn.Module) -> None:
    """Initialise as BERT does: normal weights with a standard deviation of 0.02, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
