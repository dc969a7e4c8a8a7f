"""scFoundation: an encoder of expressed genes and a decoder of all genes (Hao et al., Nature Methods 2024).

doi:10.1038/s41592-024-02305-7. The decoder is a Performer, see :mod:`scllm.models.performer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scllm.data.encode import DepthEncoder, Encoder
from scllm.data.encode.depth import SOURCE, TARGET
from scllm.data.vocab import Vocab
from scllm.models.base import Batch, CellModel, Checkpoint, ModelConfig, Outputs, Pooling
from scllm.models.entries import entry
from scllm.models.layers import Block
from scllm.models.performer import KeyMaximum, PerformerBlock, original_names, redraw
from scllm.models.pruning import BlockParts, block_parts
from scllm.models.storage import gene_list, plain_weights, read_torch, renamed, require

__all__ = ["FINETUNE", "PRETRAIN", "SIZES", "Config", "Model", "SoftBins", "read"]

SIZES = {
    "tiny": {
        "n_layers": 2,
        "n_heads": 4,
        "d_model": 64,
        "d_hidden": 128,
        "decoder_layers": 1,
        "decoder_heads": 4,
        "d_decoder": 64,
        "decoder_d_head": 16,
    },
    "small": {
        "n_layers": 4,
        "n_heads": 4,
        "d_model": 128,
        "d_hidden": 512,
        "decoder_layers": 2,
        "decoder_heads": 4,
        "d_decoder": 128,
        "decoder_d_head": 32,
    },
    "base": {},
}

# the decoder predicts every gene of the vocabulary, so steps have few cells
PRETRAIN = {"epochs": 6, "batch_size": 16, "lr": 1e-4, "downsample": 0.8}
FINETUNE = {"epochs": 3, "batch_size": 32, "lr": 3e-5}

Part = Literal["cell", "rde", "gene"]


@dataclass(frozen=True)
class Config(ModelConfig):
    """Architecture of scFoundation; defaults are those of the published model.

    Parameters
    ----------
    d_hidden
        Width of the encoder's feed-forward layers; the decoder's are four times as wide as its tokens.
    n_bins, bin_alpha
        Number of bins that a value is a mixture of, and the weight of the shortcut around the second layer.
    mask_value, pad_value
        Values that mark a masked gene and padding; each has its own embedding.
    decoder_layers, decoder_heads, d_decoder, decoder_d_head
        Size of the decoder, a Performer that reads all genes.
    decoder_qkv_bias
        Whether the decoder's queries, keys and values have a bias.
    decoder_block_heads, decoder_block_hidden
        ``block_heads`` and ``block_hidden`` of the decoder.
    key_maximum
        ``"cell"``: results of a cell do not depend on its batch. ``"batch"``: as in the original, they do.
    redraw_every
        Training steps after which the Performer's random features are redrawn; ``None`` for never.
    """

    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    dropout: float = 0.1
    d_hidden: int = 3072
    n_bins: int = 100
    bin_alpha: float = 1.0
    mask_value: float = 102.0
    pad_value: float = 103.0
    decoder_layers: int = 6
    decoder_heads: int = 8
    d_decoder: int = 512
    decoder_d_head: int = 64
    decoder_qkv_bias: bool = True
    decoder_block_heads: tuple[int, ...] | None = None
    decoder_block_hidden: tuple[int, ...] | None = None
    key_maximum: KeyMaximum = "cell"
    redraw_every: int | None = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_maximum not in ("cell", "batch"):
            raise ValueError(
                f"Expected key_maximum to be 'cell' or 'batch', got {self.key_maximum!r}. Pass 'cell' to keep cells "
                "independent."
            )

    def decoder_block_sizes(self) -> list[tuple[int, int]]:
        """Return the number of heads and the feed-forward width of each block of the decoder."""
        heads = self.decoder_block_heads or (self.decoder_heads,) * self.decoder_layers
        return list(zip(heads, self.decoder_block_hidden or (4 * self.d_decoder,) * len(heads), strict=True))

    def vocab(self, genes: Iterable[str]) -> Vocab:
        """Make a vocabulary of the genes in the given order, target depth, sequencing depth and padding."""
        return Vocab((*map(str, genes), *_SPECIALS), mask=None, cls=None)

    def objective(self) -> dict[str, Any]:
        """Return the default pretraining objective."""
        return {"kind": "MaskedExpression", "mask_ratio": (0.3,), "zeros": 0.03, "hidden": 0.8, "swapped": 0.1}

    def encoder(self) -> Encoder:
        """Return the default encoder, which turns counts into token sequences."""
        return DepthEncoder()


_SPECIALS = (TARGET, SOURCE, "<pad>")


class SoftBins(nn.Module):
    """Embed a value as a mixture of learned bins."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, d = config.n_bins, config.d_model
        self.alpha, self.mask_value, self.pad_value = config.bin_alpha, config.mask_value, config.pad_value
        self.up = nn.Linear(1, n)
        self.mix = nn.Linear(n, n)
        self.table = nn.Embedding(n, d)
        self.hidden = nn.Embedding(1, d)
        self.padding = nn.Embedding(1, d)

    def weights(self, values: Tensor) -> Tensor:
        """Compute the weight of each bin, ``(t,)`` to ``(t, n_bins)``."""
        x = F.leaky_relu(self.up(values[:, None].to(self.up.weight.dtype)), 0.1)
        return (self.mix(x) + self.alpha * x).softmax(1)

    def forward(self, values: Tensor) -> Tensor:
        """``(t,)`` to ``(t, d)``."""
        x = self.weights(values) @ self.table.weight
        x = torch.where((values == self.mask_value)[:, None], self.hidden.weight.to(x.dtype), x)
        return torch.where((values == self.pad_value)[:, None], self.padding.weight.to(x.dtype), x)


class Model(CellModel):
    """scFoundation: post-norm blocks on expressed genes, then a Performer on all genes."""

    family = "scfoundation"
    pooling: Pooling = "all"
    poolings: tuple[Pooling, ...] = ("all", "max", "mean")
    reads_depth: ClassVar[bool] = True

    def __init__(self, config: Config, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        self.config: Config = config
        if vocab.tokens[-3:] != _SPECIALS:
            raise ValueError(
                f"Expected a vocabulary that ends in {_SPECIALS}, got {vocab.tokens[-3:]}. Pass gene names, from which "
                "scfoundation makes its vocabulary."
            )
        d = config.d_model
        self.value_embedding = SoftBins(config)
        self.gene_embedding = nn.Embedding(len(vocab), d)
        self.layers = nn.ModuleList(
            Block(d, heads, hidden, config.dropout, d_head=d // config.n_heads)
            for heads, hidden in config.block_sizes()
        )
        self.encoder_norm = nn.LayerNorm(d)
        self.to_decoder = nn.Linear(d, config.d_decoder)
        self.decoder_layers = nn.ModuleList(
            PerformerBlock(
                config.d_decoder,
                heads,
                config.decoder_d_head,
                hidden,
                0.0,
                qkv_bias=config.decoder_qkv_bias,
                key_maximum=config.key_maximum,
            )
            for heads, hidden in config.decoder_block_sizes()
        )
        self.decoder_norm = nn.LayerNorm(config.d_decoder)
        self.norm = nn.LayerNorm(config.d_decoder)
        self.out = nn.Linear(config.d_decoder, 1)

    @property
    def blocks(self) -> Sequence[Any]:
        """Blocks of the encoder, first to last."""
        return list(self.layers)

    def prunable(self) -> dict[str, list[BlockParts]]:
        """Return what can be removed of the blocks of the encoder and of those of the decoder."""
        return {"block": block_parts(self.blocks), "decoder_block": block_parts(list(self.decoder_layers))}

    @property
    def n_positions(self) -> int:
        """Number of tokens that the decoder reads of each cell: all genes and both depths."""
        return len(self.vocab) - 1

    def gene_table(self) -> Tensor:
        """Return the embedding of each token, ``(n_tokens, d)``."""
        return self.gene_embedding.weight

    def new_head(self, n_outputs: int) -> nn.Module:
        """Make the original's two layers on the pooled cell, without its batch norm (see ``engine.head_start``)."""
        return nn.Sequential(nn.Linear(4 * self.config.d_model, 256), nn.ReLU(), nn.Linear(256, n_outputs))

    def at_step(self, step: int, seed: int) -> None:
        """Redraw the decoder's random features every ``redraw_every`` steps; heads do not read the decoder."""
        if not self.head_specs:
            redraw(self, step, seed, self.config.redraw_every)

    def speed_up(self, *, compile: bool = False, checkpointing: bool = False) -> None:
        """Compile or checkpoint the blocks, including those of the decoder, which needs most of the memory."""
        super().speed_up(compile=compile, checkpointing=checkpointing)
        for block in self.decoder_layers:
            block.checkpointing = checkpointing  # type: ignore[assignment]
            if compile:
                block.compile_feed_forward()  # type: ignore[operator]

    def forward_flops(self, n_tokens: float) -> float:
        """Count operations of the encoder for ``n_tokens``, and of the decoder for all genes."""
        decoder: Sequence[Any] = list(self.decoder_layers)
        return super().forward_flops(n_tokens) + self.n_positions * sum(block.flops_per_token for block in decoder)

    # --- encoder ---

    def inputs(self, batch: Batch) -> Tensor:
        """Compute the input embeddings of the first block, ``(t, d)``."""
        if batch.values is None:
            raise ValueError("Expected a value for each gene, but this batch has none. Encode with a DepthEncoder.")
        return self.value_embedding(batch.values) + self.gene_embedding(batch.genes)

    def hidden(self, batch: Batch, *, layer: int = -1, first_only: bool = False) -> Tensor:
        """Compute hidden states after a block of the encoder, ``(t, d)``; normalised after the last one."""
        x = super().hidden(batch, layer=layer, first_only=first_only)
        return self.encoder_norm(x) if layer == -1 else x

    def pool(self, hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
        """Pool states: ``"all"`` is ``<S>``, ``<T>``, maximum and mean over genes; ``"max"`` includes both depths."""
        if pooling == "all":
            last = batch.cu_seqlens[1:].long() - 1
            highest, mean = super().pool(hidden, batch, "max"), super().pool(hidden, batch, "mean")
            return torch.cat([hidden[last], hidden[last - 1], highest, mean], dim=1)
        if pooling == "max":
            index = batch.cell[:, None].expand_as(hidden)
            highest = hidden.new_zeros(batch.n_cells, hidden.shape[1])
            return highest.scatter_reduce(0, index, hidden, "amax", include_self=False)
        return super().pool(hidden, batch, pooling)

    def at_depth(self, batch: Batch, depth: float | Tensor) -> Batch:
        """Return the same cells with target depth ``depth`` (counts; one number or ``(b,)``)."""
        assert batch.values is not None
        log_depth = math.log10(depth) if isinstance(depth, (int, float)) else depth.log10()
        values = batch.values.clone()
        values[batch.cu_seqlens[1:].long() - 2] = log_depth
        return batch.with_values(values)

    # --- decoder ---

    @entry
    def gene_states(self, hidden: Tensor, batch: Batch, shown: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Compute the decoder's state of every gene, then of both depths, in each cell, ``(b, p, d_decoder)``.

        Parameters
        ----------
        hidden
            Hidden states from the encoder, ``(t, d)``.
        batch
            The cells.
        shown
            Cells, genes and values ``(n,)`` that only the decoder reads. All other genes are zero.
        """
        n = self.n_positions
        zero = self.value_embedding(hidden.new_zeros(1))
        # zeros have the same embedding in every cell, so they are projected once
        x = self.to_decoder(zero + self.gene_embedding.weight[:n]).repeat(batch.n_cells, 1)
        if shown is not None:
            cell, gene, value = shown
            x[cell * n + gene] = self.to_decoder(self.value_embedding(value) + self.gene_embedding(gene)).to(x.dtype)
        x[batch.cell * n + batch.genes] = self.to_decoder(hidden + self.gene_embedding(batch.genes)).to(x.dtype)
        everything = self._everything(batch)
        for block in self.decoder_layers:
            x = block(x, everything)
        return self.norm(self.decoder_norm(x)).view(batch.n_cells, n, self.config.d_decoder)

    def _everything(self, batch: Batch) -> Batch:
        """Return the cells with a token for every position."""
        n, device = self.n_positions, batch.genes.device
        ends = torch.arange(batch.n_cells + 1, dtype=torch.int32, device=device) * n
        genes = torch.arange(n, device=device).repeat(batch.n_cells)
        return Batch(genes, None, ends, (n,) * batch.n_cells, batch.keys)

    @entry
    def expression(self, states: Tensor) -> Tensor:
        """Predict ``log1p`` of normalised expression from the decoder's states, ``(..., d_decoder)`` to ``(...)``."""
        return self.out(states).squeeze(-1)

    def forward(self, batch: Batch) -> Outputs:
        """Compute predictions for every token and every cell."""
        hidden = self.hidden(batch)
        cell = self.pool(hidden, batch, self.pooling)
        value = self.expression(self.gene_states(hidden, batch)[batch.cell, batch.genes])
        return Outputs(hidden, cell, {"value": value} | self.head_outputs_after(hidden, batch))

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Predict the tokens ``at``, ``(n,)``; with ``hide``, these are masked in the input."""
        cell, gene, shown = batch.cell[at], batch.genes[at], None
        if hide:
            shown = (cell, gene, torch.full((len(at),), self.config.mask_value, device=gene.device))
            batch = batch.without(at, torch.bincount(cell, minlength=batch.n_cells).tolist())
        return self.expression(self.gene_states(self.hidden(batch), batch, shown)[cell, gene])

    def reconstruct_genes(self, batch: Batch, genes: Tensor) -> Tensor:
        """Predict chosen genes, expressed or not, ``(b, g)``."""
        return self.expression(self.gene_states(self.hidden(batch), batch)[:, genes])


# --- the original's checkpoint ---

_NAMES: tuple[tuple[str, str], ...] = (
    ("token_emb.mlp.", "value_embedding.up."),
    ("token_emb.mlp2.", "value_embedding.mix."),
    ("token_emb.emb.", "value_embedding.table."),
    ("token_emb.emb_mask.", "value_embedding.hidden."),
    ("token_emb.emb_pad.", "value_embedding.padding."),
    ("pos_emb.", "gene_embedding."),
    ("encoder.transformer_encoder.#.self_attn.in_proj_", "layers.#.attention.qkv."),
    ("encoder.transformer_encoder.#.self_attn.out_proj.", "layers.#.attention.out."),
    ("encoder.transformer_encoder.#.linear1.", "layers.#.up."),
    ("encoder.transformer_encoder.#.linear2.", "layers.#.down."),
    ("encoder.transformer_encoder.#.norm", "layers.#.norm"),
    ("encoder.norm.", "encoder_norm."),
    *original_names("decoder.performer.", "decoder_layers."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder_embed.", "to_decoder."),
    ("to_final.", "out."),
)
# here, the step decides when random features are redrawn
_UNUSED = ("decoder.performer.calls_since_last_redraw",)
_CHECKPOINT = "models.ckpt"
_GENE_LISTS = ("scfoundation_gene_list_19264.json.gz", "genes.json", "genes.txt", "vocab.json")


def read(path: str | Path, *, vocab: Vocab | None = None, part: str | None = None) -> Checkpoint:
    """Read one of the three models in ``models.ckpt``, or in the folder that contains it.

    The file contains no gene names. They come from ``vocab``, in the order that the model was trained with, or from a
    list next to the file. ``part`` is ``"cell"`` (for embeddings, the default), ``"rde"`` (read-depth enhancement) or
    ``"gene"``.
    """
    path = Path(path)
    file = path / _CHECKPOINT if path.is_dir() else path
    content, part = read_torch(file), part or "cell"
    if part not in get_args(Part) or part not in content:
        raise ValueError(
            f"Expected part to be one of {get_args(Part)} that {file} contains, got {part!r}. It contains "
            f"{sorted(map(str, content))[:8]}. Pass another part."
        )
    where = f"part {part!r} of {file}"
    require(content[part], {"config": dict, "state_dict": dict}, where)
    settings, original = content[part]["config"], plain_weights(content[part]["state_dict"], where)
    weights = {
        renamed(name, _NAMES): tensor
        for name, tensor in ((name.split("model.", 1)[-1], tensor) for name, tensor in original.items())
        if not name.startswith(_UNUSED)
    }
    require(settings, {"model": str, "model_config": dict}, f"the config in {where}")
    require(settings["model_config"], {settings["model"]: dict}, f"model_config in {where}")
    config = _config(settings["model_config"][settings["model"]], weights, where)
    n_genes = len(weights["gene_embedding.weight"]) - len(_SPECIALS)
    vocab = config.vocab(gene_list(file, vocab, n_genes, _GENE_LISTS))
    return Checkpoint(config, vocab, DepthEncoder(max_len=len(vocab) - 1), weights)


def _config(settings: dict[str, Any], weights: dict[str, Tensor], where: str) -> Config:
    """Read numbers of layers and heads from the file's settings, and widths from the weights."""
    numbers = {"bin_num": int, "bin_alpha": Real, "mask_token_id": Real, "pad_token_id": Real}
    require(settings, {"encoder": dict, "decoder": dict, **numbers}, f"the model_config in {where}")
    encoder, decoder = settings["encoder"], settings["decoder"]
    sizes = {"module_type": str, "depth": int, "heads": int}
    require(encoder, {**sizes, "hidden_dim": int}, f"the encoder's settings in {where}")
    require(decoder, sizes, f"the decoder's settings in {where}")
    if (
        encoder["module_type"] != "transformer"
        or decoder["module_type"] != "performer"
        or encoder.get("norm_first", False)
    ):
        raise ValueError(
            "Expected a post-norm transformer encoder and a performer decoder, but the checkpoint has a "
            f"{encoder['module_type']} encoder (norm_first={encoder.get('norm_first', False)}) and a "
            f"{decoder['module_type']} decoder. Use another file."
        )
    query = weights["decoder_layers.0.attention.query.weight"]
    return Config(
        n_layers=encoder["depth"],
        n_heads=encoder["heads"],
        d_model=encoder["hidden_dim"],
        d_hidden=len(weights["layers.0.up.weight"]),
        n_bins=settings["bin_num"],
        bin_alpha=settings["bin_alpha"],
        mask_value=float(settings["mask_token_id"]),
        pad_value=float(settings["pad_token_id"]),
        decoder_layers=decoder["depth"],
        decoder_heads=decoder["heads"],
        d_decoder=query.shape[1],
        decoder_d_head=len(query) // decoder["heads"],
        decoder_qkv_bias="decoder_layers.0.attention.query.bias" in weights,
    )
