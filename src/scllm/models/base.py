"""The base class of all model families."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import pandas as pd
import torch
from torch import Tensor, nn

from scllm._typing import HeadReads
from scllm.data.encode import Encoder, encoder_to_dict
from scllm.data.vocab import Vocab
from scllm.models.batch import Batch, Outputs
from scllm.models.config import ModelConfig
from scllm.models.entries import entry
from scllm.models.heads import HeadSpec, Level, Pooling
from scllm.models.int8 import WeightDtype, to_float
from scllm.models.known_cells import KnownCells, known_arrays
from scllm.models.pruning import BlockParts, block_parts, compression
from scllm.models.rank_weights import rank_weights
from scllm.models.storage import check_empty, write_native

__all__ = ["Batch", "CellModel", "Checkpoint", "HeadSpec", "Level", "ModelConfig", "Outputs", "Pooling"]


@dataclass
class Checkpoint:
    """The content of a published checkpoint, as returned by a family's ``read``."""

    config: ModelConfig
    vocab: Vocab
    encoder: Encoder
    weights: dict[str, Tensor]
    heads: tuple[HeadSpec, ...] = ()


class CellModel(nn.Module):
    """A single-cell transformer with everything needed to use it: weights, vocabulary and encoder.

    Use :func:`scllm.models.build`, :func:`scllm.models.load` or a function that trains to get one.

    Attributes
    ----------
    config
        The architecture.
    vocab
        Token ids of genes and special tokens.
    encoder
        Turns counts into token sequences.
    history
        Training history (a DataFrame); ``None`` if the model was not trained with scllm.
    comparison
        Size, speed and agreement before and after :func:`scllm.tl.quantize` or :func:`scllm.tl.prune`; ``None`` for
        other models.
    trained_on
        Data sets, donors and filters of all cells that the model was trained on, one row each; ``None`` if they are not
        known.
    weight_dtype
        Data type of the stored weights: ``"float32"``, or the one chosen in :func:`scllm.tl.quantize`.
    path
        Where the model was last saved or loaded.
    head_specs
        What each module in ``heads`` predicts.
    known_cells
        What :func:`scllm.tl.finetune` keeps of the training and validation cells of each head that predicts labels, to
        find cells of other types; empty for other models.
    """

    family: ClassVar[str]
    pooling: Pooling = "cls"
    poolings: tuple[Pooling, ...] = ("cls", "mean", "ranked", "linear", "max")
    """Ways in which the family can pool the hidden states of a cell into one vector."""
    unit_length: ClassVar[bool] = False
    """Whether the family's default cell embedding is scaled to unit length."""
    head_pooling: ClassVar[Pooling | None] = None
    """Pooling for new linear heads, unless they read only the inputs; ``None``: heads are like the published ones."""
    heads_read_cells: ClassVar[bool] = True
    """Whether heads read one vector per cell, rather than the hidden states of all its tokens."""
    reads_depth: ClassVar[bool] = False
    """Whether the family can predict expression at another sequencing depth."""
    reads_expression: ClassVar[bool] = True
    """Whether the family reads the expression of cells, rather than images."""
    reads_genes: ClassVar[bool] = True
    """Whether the family's tokens are genes, so that each gene has a hidden state in each cell."""
    likelihood: Literal["causal", "pseudo", "permutation"] | None = None
    """Kind of likelihood of a token sequence; ``None`` for models that do not predict genes."""

    is_special: Tensor
    heads: nn.ModuleList

    def __init__(self, config: ModelConfig, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.encoder = encoder
        self.history: pd.DataFrame | None = None
        self.comparison: pd.DataFrame | None = None
        self.trained_on: pd.DataFrame | None = None
        self.path: Path | None = None
        self.weight_dtype: WeightDtype = "float32"
        self.head_specs: tuple[HeadSpec, ...] = ()
        self.heads = nn.ModuleList()
        self.known_cells: dict[str, KnownCells] = {}
        special = torch.zeros(len(vocab), dtype=torch.bool)
        special[torch.from_numpy(vocab.special_ids).long()] = True
        self.register_buffer("is_special", special, persistent=False)

    @property
    def report(self) -> pd.DataFrame | None:
        """The ``comparison`` of a compressed model with the original; ``trained_on`` for other models."""
        return self.trained_on if self.comparison is None else self.comparison

    @property
    def blocks(self) -> Sequence[Any]:
        """Transformer blocks, first to last."""
        raise self._undefined("blocks")

    def inputs(self, batch: Batch) -> Tensor:
        """Compute the input embeddings of the first block, ``(t, d)``."""
        raise self._undefined("inputs")

    def forward(self, batch: Batch) -> Outputs:
        """Compute everything that the model predicts."""
        raise self._undefined("forward")

    def gene_table(self) -> Tensor:
        """Return the embedding of each token without context, ``(n_tokens, d)``."""
        raise self._undefined("gene_table")

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Predict the tokens ``at``, ``(n,)``; with ``hide``, these are masked in the input."""
        raise ValueError(f"Models of the family {self.family!r} do not predict expression. Use another family.")

    def reconstruct_genes(self, batch: Batch, genes: Tensor) -> Tensor:
        """Predict chosen genes in each cell, expressed or not, ``(b, g)``."""
        raise ValueError(
            f"This {self.family} model predicts no genes that are absent from the token sequence. Leave genes= out."
        )

    def at_depth(self, batch: Batch, depth: float | Tensor) -> Batch:
        """Return the same cells with another target depth (counts; one number or ``(b,)``)."""
        raise ValueError(f"Models of the family {self.family!r} do not take a sequencing depth. Use another family.")

    @entry
    def gene_logits(self, batch: Batch, at: Tensor) -> Tensor:
        """Compute logits of the tokens at positions ``at``, ``(n, n_tokens)``, from what the family may see."""
        raise ValueError(
            f"Models of the family {self.family!r} do not predict genes. Use a gene language model, such as 'gpt2'."
        )

    @entry
    def gene_loss(self, batch: Batch, at: Tensor, genes: Tensor) -> Tensor:
        """Sum the cross-entropy (nats) of ``genes`` ``(n,)`` at positions ``at``, from what the family may see."""
        return nn.functional.cross_entropy(self.gene_logits(batch, at).float(), genes, reduction="sum")

    def write_original(self, path: Path) -> None:
        """Write the family's published format."""
        raise ValueError(f"scllm writes no published format of {self.family}. Use format='native'.")

    def new_head(self, n_outputs: int) -> nn.Module:
        """Make a new head like those of the family's published checkpoints."""
        return nn.Linear(self.config.d_model, n_outputs)

    def new_gene_head(self, n_outputs: int) -> nn.Module:
        """Make a new head on gene tokens; it is linear, so the mean of its outputs is its output for the mean state."""
        return nn.Linear(self.config.d_model, n_outputs)

    def prunable(self) -> dict[str, list[BlockParts]]:
        """Return what can be removed of each block, by the prefix of its fields in the configuration."""
        return {"block": block_parts(self.blocks)}

    def matrices(self) -> list[tuple[nn.Module, dict[str, tuple[int, ...]]]]:
        """Return modules that multiply by matrices without being linear layers, for int8 and pruning.

        With each module, the names of its matrices and the axes along which int8 weights share a scale.
        """
        return []

    def layers_changed(self) -> None:
        """Update the model after layers were replaced."""

    def _undefined(self, name: str) -> TypeError:
        return TypeError(
            f"Expected every family to define {name}, but {type(self).__name__} does not. Add it to the model class; "
            f"CellModel.{name} describes what it returns."
        )

    @entry
    def hidden(self, batch: Batch, *, layer: int = -1, first_only: bool = False) -> Tensor:
        """Compute hidden states after a block, ``(t, d)``; with ``first_only``, only of first tokens, ``(b, d)``."""
        x = self.inputs(batch)
        blocks = self.blocks[: self.config.n_layers + 1 + layer]
        if not blocks:
            return x[batch.first] if first_only else x
        for block in blocks[:-1]:
            x = block(x, batch)
        return blocks[-1].first(x, batch) if first_only else blocks[-1](x, batch)

    @entry
    def first_and_last(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute input embeddings of the first block and hidden states after the last block, ``(t, d)`` each."""
        first = last = self.inputs(batch)
        for block in self.blocks:
            last = block(last, batch)
        return first, last

    def speed_up(self, *, compile: bool = False, checkpointing: bool = False) -> None:
        """Compile the blocks' pointwise parts, or recompute blocks in the backward pass to save memory."""
        for block in self.blocks:
            block.checkpointing = checkpointing
            if compile:
                block.compile_feed_forward()

    def at_step(self, step: int, seed: int) -> None:
        """Prepare for a training step; called before its forward passes, with the same step on every process."""

    def set_heads(self, specs: Iterable[HeadSpec]) -> None:
        """Replace all heads by new ones."""
        self.known_cells = {}
        self.head_specs = tuple(specs)
        self.heads = nn.ModuleList(self._new_head(spec) for spec in self.head_specs)

    def _new_head(self, spec: HeadSpec) -> nn.Module:
        if spec.level == "gene":
            return self.new_gene_head(spec.n_outputs)
        # only the family knows what a published head reads
        if spec.pooling is None:
            return self.new_head(spec.n_outputs)
        head = nn.Linear(self.config.d_model * (2 if spec.reads == "both" else 1), spec.n_outputs)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def is_expressed(self, batch: Batch) -> Tensor:
        """Return which tokens are expressed genes, ``(t,)``: neither special tokens nor zeros."""
        gene = ~self.is_special[batch.genes]
        return gene if batch.values is None else gene & (batch.values > 0)

    def pool(self, hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
        """Pool the genes of each cell (``"cls"``: its first token) to ``(b, d)``; see :func:`rank_weights`."""
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
            how = cast(Literal["ranked", "linear"], pooling)
            weight = rank_weights(cell, values, batch.n_cells, how, spacing=batch.spacing, longest=longest)
        elif pooling == "mean":
            weight = 1 / torch.bincount(cell, minlength=batch.n_cells)[cell]
        else:
            raise ValueError(
                f"Expected {type(self).__name__}.pool to know all poolings of the family, {self.poolings}, but it does "
                f"not know {pooling!r}. Add it there."
            )
        # summing a thousand terms in bfloat16 would lose most of them
        total = torch.zeros(shape, device=hidden.device)
        return total.index_add(0, cell, hidden[gene].float() * weight[:, None]).to(hidden.dtype)

    @entry
    def embed(self, batch: Batch, *, pooling: Pooling | None = None, layer: int = -1) -> Tensor:
        """Compute the embedding of each cell, ``(b, d)``; ``pooling=None`` is the family's default."""
        how = pooling or self.pooling
        if how == "cls":
            # the last block needs queries for <cls> only
            cell = self.hidden(batch, layer=layer, first_only=True)
        else:
            cell = self.pool(self.hidden(batch, layer=layer), batch, how)
        return nn.functional.normalize(cell.float(), dim=1) if pooling is None and self.unit_length else cell

    def head_state(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Pool hidden states of tokens into the vector of each cell that heads read, ``(b, d)``."""
        return self.pool(hidden, batch, self._head_pooling or self.pooling)

    @entry
    def head_inputs(self, batch: Batch) -> Tensor:
        """Compute the inputs of the heads for each cell: ``(b, d)``, or ``(b, 2 d)`` if they read two embeddings."""
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

    @entry
    def head_outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Compute logits (or values) of every head on cells, by key."""
        return self.apply_heads(self.head_inputs(batch))

    def head_outputs_after(self, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Compute the same from hidden states after the last block that are already known, ``(t, d)``."""
        if self._head_reads != "last":
            return self.head_outputs(batch)
        return self.apply_heads(self.head_state(hidden, batch))

    @entry
    def apply_heads(self, cell: Tensor) -> dict[str, Tensor]:
        """Compute logits (or values) of every head on cells, by key, from the inputs of the heads."""
        return {key: head(cell) for key, head in self.heads_on("cell").items()}

    @entry
    def gene_head_outputs(self, batch: Batch) -> dict[str, Tensor]:
        """Compute logits of every head on genes, by key, for all tokens: ``(t, k)``."""
        hidden = self.hidden(batch)
        return {key: head(hidden) for key, head in self.heads_on("gene").items()}

    def heads_on(self, level: Level) -> dict[str, nn.Module]:
        """Return the heads on cells or on genes, by key."""
        pairs = zip(self.head_specs, self.heads, strict=True)
        return {spec.key: head for spec, head in pairs if spec.level == level}

    def forward_flops(self, n_tokens: float) -> float:
        """Count floating-point operations of the blocks for a cell of ``n_tokens``.

        A token costs ``2 (4 d e + 2 d f) + 4 S e`` per block, where ``e`` is the total width of the heads (``d`` unless
        some were pruned). The embedding table is looked up, not multiplied.
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
        """Device of the weights."""
        return next(self.parameters()).device

    def hash(self) -> str:
        """Hash everything that determines the output: architecture, vocabulary, encoder, heads and weights."""
        digest = hashlib.blake2b(digest_size=8)
        heads = [asdict(spec) for spec in self.head_specs]
        said = [asdict(self.config), self.vocab.to_dict(), encoder_to_dict(self.encoder), heads]
        digest.update(json.dumps(said, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, array in sorted(known_arrays(self.head_specs, self.known_cells).items()):
            digest.update(name.encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def save(self, path: str | PathLike[str], *, format: str = "native") -> None:
        """Save the model to a folder.

        Parameters
        ----------
        path
            The folder, which is created if needed.
        format
            ``"native"`` (weights, vocabulary, encoder, heads), or the published format of the model's own family. A
            published format holds at most one classification head, made with ``head_reads="published"``
            (:class:`scllm.tl.TrainConfig`), and needs a new or empty folder. That of scgpt stores the order of the
            labels, but not their names.
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
                f"Expected format to be 'native' or the model's own family {self.family!r}, got {format!r}. A model "
                "cannot be saved in the format of another family."
            )

    def _as_published(self) -> CellModel:
        """Return the model in a form that published formats can hold."""
        value = next((spec.key for spec in self.head_specs if spec.classes is None), None)
        if value is not None:
            raise ValueError(
                f"The published format of {self.family} holds heads that predict labels, but the head on {value!r} "
                "predicts a value. Use format='native'."
            )
        if self.config.block_heads is not None:
            raise ValueError(
                f"The published format of {self.family} holds only complete blocks, but heads and neurons were pruned "
                f"(heads left: {list(self.config.block_heads)}). Use format='native'."
            )
        model = copy.deepcopy(self)
        to_float(model)
        with torch.no_grad():
            for spec, head in zip(model.head_specs, model.heads, strict=True):
                # published formats have no field for the temperature, so it goes into the weights
                last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
                for weight in last.parameters():
                    weight.div_(spec.temperature)
        return model

    def __repr__(self) -> str:
        config, heads = (
            self.config,
            ", ".join(
                f"{spec.key} ({'value' if spec.classes is None else _number_of_classes(spec.n_outputs)})"
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


def _number_of_classes(n: int) -> str:
    return f"{n} class{'es' if n != 1 else ''}"
