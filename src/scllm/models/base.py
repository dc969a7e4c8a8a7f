"""What every model family has in common: a configuration, a vocabulary, an encoder, and one packed batch."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from scllm._typing import HeadReads
from scllm.data.encode import Encoder, encoder_to_dict
from scllm.data.vocab import Vocab
from scllm.models.batch import Batch, Outputs
from scllm.models.config import ModelConfig
from scllm.models.heads import HeadSpec, Level, Pooling
from scllm.models.int8 import WeightDtype, to_float
from scllm.models.pruning import compression
from scllm.models.rank_weights import rank_weights
from scllm.models.storage import check_empty, write_native

__all__ = ["Batch", "CellModel", "Checkpoint", "HeadSpec", "Level", "ModelConfig", "Outputs", "Pooling"]


@dataclass
class Checkpoint:
    """What a family's ``read`` finds in a foreign format."""

    config: ModelConfig
    vocab: Vocab
    encoder: Encoder
    weights: dict[str, Tensor]
    heads: tuple[HeadSpec, ...] = ()


class CellModel(nn.Module):
    """A single-cell transformer with all that is needed to use it: weights, vocabulary and encoder.

    Made by :func:`scllm.models.build`, :func:`scllm.models.load` and the verbs that train.

    Attributes
    ----------
    config
        The architecture.
    vocab
        Token ids of genes and specials.
    encoder
        How counts become sentences.
    history
        Training history (a DataFrame), ``None`` for a model that was not trained here.
    report
        Sizes, speed and agreement before and after :func:`scllm.tl.quantize` or :func:`scllm.tl.prune`.
    weight_dtype
        What the weights are stored as: ``"float32"``, or what :func:`scllm.tl.quantize` made of them.
    path
        Where the model was saved or loaded last.
    head_specs
        What each module in ``heads`` answers.
    """

    family: ClassVar[str]
    pooling: Pooling = "cls"
    poolings: tuple[Pooling, ...] = ("cls", "mean", "ranked", "linear", "max")
    """Ways of making one vector of a cell's states that the family has."""
    unit_length: ClassVar[bool] = False
    """Whether the family's own cell embedding is scaled to length one."""
    head_pooling: ClassVar[Pooling | None] = None
    """How fresh linear heads read states, but for those of inputs; ``None``: they are like the published ones."""
    heads_read_cells: ClassVar[bool] = True
    """Whether heads read one vector a cell, and not the states of all its tokens."""
    reads_depth: ClassVar[bool] = False
    """Whether the family can be asked for expression at another sequencing depth."""
    reads_genes: ClassVar[bool] = True
    """Whether the family's tokens are genes, so that each gene has a state in each cell."""
    likelihood: Literal["causal", "pseudo", "permutation"] | None = None
    """How the model says how likely a sentence is; ``None`` for models that predict no genes."""

    is_special: Tensor
    heads: nn.ModuleList

    def __init__(self, config: ModelConfig, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.encoder = encoder
        self.history: pd.DataFrame | None = None
        self.report: pd.DataFrame | None = None
        self.path: Path | None = None
        self.weight_dtype: WeightDtype = "float32"
        self.head_specs: tuple[HeadSpec, ...] = ()
        self.heads = nn.ModuleList()
        special = torch.zeros(len(vocab), dtype=torch.bool)
        special[torch.from_numpy(vocab.special_ids).long()] = True
        self.register_buffer("is_special", special, persistent=False)

    @property
    def blocks(self) -> Sequence[Any]:
        """The transformer blocks, first to last."""
        raise self._undefined("blocks")

    def inputs(self, batch: Batch) -> Tensor:
        """What the first block reads, ``(t, d)``."""
        raise self._undefined("inputs")

    def forward(self, batch: Batch) -> Outputs:
        """Everything the model predicts."""
        raise self._undefined("forward")

    def gene_table(self) -> Tensor:
        """The embedding of each token before any context, ``(n_tokens, d)``."""
        raise self._undefined("gene_table")

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """What the model predicts at the tokens ``at``, ``(n,)``; with ``hide`` without having seen those."""
        raise ValueError(f"{self.family} models do not predict expression. Use another family.")

    def reconstruct_genes(self, batch: Batch, genes: Tensor) -> Tensor:
        """Expression of chosen genes in each cell, expressed or not, ``(b, g)``."""
        raise ValueError(
            f"this {self.family} model does not predict genes that are not in the sentence. Leave genes= out."
        )

    def at_depth(self, batch: Batch, depth: float | Tensor) -> Batch:
        """The same cells, asked for at another sequencing depth (counts; one number or ``(b,)``)."""
        raise ValueError(f"{self.family} models do not read the sequencing depth. Use another family.")

    def gene_logits(self, batch: Batch, at: Tensor) -> Tensor:
        """Logits of the tokens at positions ``at``, ``(n, n_tokens)``, from what the family may see."""
        raise ValueError(f"{self.family} models do not predict genes. Use a gene language model, such as 'gpt2'.")

    def gene_loss(self, batch: Batch, at: Tensor, genes: Tensor) -> Tensor:
        """Summed cross-entropy (nats) of ``genes`` ``(n,)`` at positions ``at``, from what the family may see."""
        return nn.functional.cross_entropy(self.gene_logits(batch, at).float(), genes, reduction="sum")

    def write_original(self, path: Path) -> None:
        """Write the family's published format."""
        raise ValueError(f"{self.family} has no published format that scllm writes. Use format='native'.")

    def new_head(self, n_outputs: int) -> nn.Module:
        """A fresh head of the kind that the family's published checkpoints have."""
        return nn.Linear(self.config.d_model, n_outputs)

    def new_gene_head(self, n_outputs: int) -> nn.Module:
        """A fresh head on gene tokens; linear, so that the mean of its outputs is its output of the mean state."""
        return nn.Linear(self.config.d_model, n_outputs)

    def prunable(self) -> dict[str, Sequence[Any]]:
        """Blocks whose heads and neurons can be taken out, by the beginning of their fields in the configuration."""
        return {"block": self.blocks}

    def layers_changed(self) -> None:
        """Called after layers were replaced by others."""

    def _undefined(self, name: str) -> TypeError:
        return TypeError(
            f"{type(self).__name__} does not define {name}, which is expected of every family. Write it in the class "
            f"of the model; CellModel.{name} says what it returns."
        )

    def hidden(self, batch: Batch, *, layer: int = -1, first_only: bool = False) -> Tensor:
        """States of all tokens after a block, ``(t, d)``; with ``first_only`` of each cell's first one, ``(b, d)``."""
        x = self.inputs(batch)
        blocks = self.blocks[: self.config.n_layers + 1 + layer]
        if not blocks:
            return x[batch.first] if first_only else x
        for block in blocks[:-1]:
            x = block(x, batch)
        return blocks[-1].first(x, batch) if first_only else blocks[-1](x, batch)

    def first_and_last(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of all tokens before the first and after the last block, ``(t, d)`` each."""
        first = last = self.inputs(batch)
        for block in self.blocks:
            last = block(last, batch)
        return first, last

    def speed_up(self, *, compile: bool = False, checkpointing: bool = False) -> None:
        """Compile the blocks' pointwise parts, or compute blocks again in the backward pass for less memory."""
        for block in self.blocks:
            block.checkpointing = checkpointing
            if compile:
                block.compile_feed_forward()

    def at_step(self, step: int, seed: int) -> None:
        """Make ready for a step of training; called before its forward passes, with the same step on every process."""

    def set_heads(self, specs: Iterable[HeadSpec]) -> None:
        """Replace all heads by fresh ones."""
        self.head_specs = tuple(specs)
        self.heads = nn.ModuleList(self._new_head(spec) for spec in self.head_specs)

    def _new_head(self, spec: HeadSpec) -> nn.Module:
        if spec.level == "gene":
            return self.new_gene_head(spec.n_outputs)
        # what a published head reads is known to the family alone
        if spec.pooling is None:
            return self.new_head(spec.n_outputs)
        head = nn.Linear(self.config.d_model * (2 if spec.reads == "both" else 1), spec.n_outputs)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def is_expressed(self, batch: Batch) -> Tensor:
        """Which tokens are expressed genes, ``(t,)``: no specials and no zeros."""
        gene = ~self.is_special[batch.genes]
        return gene if batch.values is None else gene & (batch.values > 0)

    def pool(self, hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
        """One vector a cell, ``(b, d)``, of its genes (``"cls"``: of its first token); see :func:`rank_weights`."""
        if pooling == "cls":
            return hidden[batch.first]
        gene = ~self.is_special[batch.genes]
        cell = batch.cell[gene]
        shape = (batch.n_cells, hidden.shape[1])
        if pooling == "max":
            index = cell[:, None].expand(-1, shape[1])
            return hidden.new_zeros(shape).scatter_reduce(0, index, hidden[gene], "amax", include_self=False)
        if pooling in ("ranked", "linear"):
            values = None if batch.values is None else batch.values[gene]
            longest = self.encoder.max_len - self.encoder.n_specials
            weight = rank_weights(cell, values, batch.n_cells, pooling, spacing=batch.spacing, longest=longest)
        else:
            weight = 1 / torch.bincount(cell, minlength=batch.n_cells)[cell]
        # a sum of a thousand terms in bfloat16 would lose most of them
        total = torch.zeros(shape, device=hidden.device)
        return total.index_add(0, cell, hidden[gene].float() * weight[:, None]).to(hidden.dtype)

    def embed(self, batch: Batch, *, pooling: Pooling | None = None, layer: int = -1) -> Tensor:
        """Embedding of each cell, ``(b, d)``; ``pooling=None`` is the family's own."""
        how = pooling or self.pooling
        if how == "cls":
            # the last block's queries are needed for <cls> only
            cell = self.hidden(batch, layer=layer, first_only=True)
        else:
            cell = self.pool(self.hidden(batch, layer=layer), batch, how)
        return nn.functional.normalize(cell.float(), dim=1) if pooling is None and self.unit_length else cell

    def head_state(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What the heads read of each cell, ``(b, d)``, from the states of its tokens."""
        return self.pool(hidden, batch, self._head_pooling or self.pooling)

    def head_inputs(self, batch: Batch) -> Tensor:
        """What the heads read of each cell, ``(b, d)``, or ``(b, 2 d)`` where they read two states of it."""
        match self._head_reads:
            case "inputs":
                return self.head_state(self.inputs(batch), batch)
            case "both":
                return torch.cat([self.head_state(states, batch) for states in self.first_and_last(batch)], dim=1)
        if (self._head_pooling or self.pooling) == "cls":
            return self.hidden(batch, first_only=True)
        return self.head_state(self.hidden(batch), batch)

    @property
    def _head_pooling(self) -> Pooling | None:
        # all heads of a model read the same
        return self.head_specs[0].pooling if self.head_specs else None

    @property
    def _head_reads(self) -> HeadReads:
        return self.head_specs[0].reads if self.head_specs else "last"

    def head_outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Logits (or values) of every head on cells by its key."""
        return self.apply_heads(self.head_inputs(batch))

    def head_outputs_after(self, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The same where the states after the last block are known, ``(t, d)``."""
        if self._head_reads != "last":
            return self.head_outputs(batch)
        return self.apply_heads(self.head_state(hidden, batch))

    def apply_heads(self, cell: Tensor) -> dict[str, Tensor]:
        """Logits (or values) of every head on cells by its key, from what they read."""
        return {key: head(cell) for key, head in self.heads_on("cell").items()}

    def gene_head_outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Logits of every head on genes by its key, from the states of all tokens: ``(t, k)``."""
        hidden = self.hidden(batch)
        return {key: head(hidden) for key, head in self.heads_on("gene").items()}

    def heads_on(self, level: Level) -> dict[str, nn.Module]:
        """Heads that read cells, or genes, by key."""
        pairs = zip(self.head_specs, self.heads, strict=True)
        return {spec.key: head for spec, head in pairs if spec.level == level}

    def forward_flops(self, n_tokens: float) -> float:
        """Floating-point operations of the blocks for a cell of ``n_tokens``.

        A token costs ``2 (4 d e + 2 d f) + 4 S e`` a block, where heads are ``e`` wide together (``d``, unless some
        were pruned); the embedding table is looked up, not multiplied.
        """
        d, sizes = self.config.d_model, self.config.block_sizes()
        repeats = self.config.n_layers / len(sizes)  # layers may share a block
        inner = sum(heads for heads, _ in sizes) * (d // self.config.n_heads) * repeats
        hidden = sum(width for _, width in sizes) * repeats
        return n_tokens * (2 * (4 * d * inner + 2 * d * hidden) + 4 * n_tokens * inner)

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def hash(self) -> str:
        """Short hash of all that decides what the model says: architecture, vocabulary, encoder, heads and weights."""
        digest = hashlib.blake2b(digest_size=8)
        heads = [asdict(spec) for spec in self.head_specs]
        said = [asdict(self.config), self.vocab.to_dict(), encoder_to_dict(self.encoder), heads]
        digest.update(json.dumps(said, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | PathLike[str], *, format: Literal["native", "scgpt", "geneformer"] = "native") -> None:
        """Write the model into a folder.

        Parameters
        ----------
        path
            The folder; made if it is not there.
        format
            ``"native"`` (weights, vocabulary, encoder, heads), or the published format of the model's own family, which
            has room for one head of labels, made with ``head_reads="published"`` (:class:`scllm.tl.TrainConfig`); that
            of scgpt keeps the order of the labels and not their names. It is written into a new or empty folder.
        """
        path = Path(path).absolute()
        if format == "native":
            write_native(self, path)
            self.path = path
        elif format == self.family:
            check_empty(path)
            self._as_published().write_original(path)
        else:
            raise ValueError(
                f"format is {format!r}, 'native' or the model's own family {self.family!r} expected. "
                "A model cannot be written in the format of another family."
            )

    def _as_published(self) -> CellModel:
        """The model as published formats can hold it."""
        value = next((spec.key for spec in self.head_specs if spec.classes is None), None)
        if value is not None:
            raise ValueError(
                f"the head on {value!r} predicts a value, labels expected by {self.family}. Use format='native'."
            )
        if self.config.block_heads is not None:
            raise ValueError(
                f"heads and neurons were pruned (heads left: {list(self.config.block_heads)}), whole blocks expected: "
                f"the format of {self.family} holds no others. Use format='native'."
            )
        model = copy.deepcopy(self)
        to_float(model)
        with torch.no_grad():
            for spec, head in zip(model.head_specs, model.heads, strict=True):
                # the temperature of the probabilities has no place of its own there
                last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
                for weight in last.parameters():
                    weight.div_(spec.temperature)
        return model

    def __repr__(self) -> str:
        config, heads = (
            self.config,
            ", ".join(
                f"{spec.key} ({'value' if spec.classes is None else f'{spec.n_outputs} classes'})"
                for spec in self.head_specs
            ),
        )
        lines = [
            f"{self.family} model: {config.n_layers} layers x {config.n_heads} heads x {config.d_model}, "
            f"{self.n_parameters / 1e6:.1f} M weights on {self.device}",
            f"  vocabulary  {self.vocab!r}",
            f"  encoder     {self.encoder!r}",
        ]
        smaller = compression(self)
        if smaller:
            lines.append(f"  compressed  {smaller}")
        if heads:
            lines.append(f"  heads       {heads}")
        if self.history is not None and len(self.history):
            validation = self.history.loc[self.history["split"] == "validation", "loss"]
            best = f", best validation loss {validation.min():.4g}" if len(validation) else ""
            lines.append(f"  trained     {int(self.history['step'].max())} steps{best}")
        if self.path is not None:
            lines.append(f"  saved in    {self.path}")
        return "\n".join(lines)
