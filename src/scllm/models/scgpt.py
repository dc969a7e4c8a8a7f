"""scGPT: a transformer on binned expression (Cui et al., Nature Methods 2024, doi:10.1038/s41592-024-02201-0)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scllm.data.encode import BinEncoder, Encoder, ValueEncoder
from scllm.data.vocab import Vocab, read_tokens
from scllm.models.base import Batch, CellModel, Checkpoint, HeadSpec, ModelConfig, Outputs
from scllm.models.config import Recipe
from scllm.models.entries import entry
from scllm.models.layers import (
    BinTable,
    Block,
    CellDecoder,
    CellToGenes,
    ClassHead,
    GradientReversal,
    ValueNetwork,
    mlp,
)
from scllm.models.storage import plain_weights, read_json, read_torch, renamed, require

__all__ = ["FINETUNE", "PRETRAIN", "RECIPES", "SIZES", "Config", "Model", "read"]

SIZES = {
    "tiny": {"n_layers": 2, "n_heads": 4, "d_model": 64, "d_hidden": 64},
    "small": {"n_layers": 4, "n_heads": 4, "d_model": 128, "d_hidden": 256},
    "base": {},
}

# settings of scGPT-style pretraining on 300,000 blood cells
# (squared errors of bins begin near 2,000, so the relational term has a large weight)
PRETRAIN = {"epochs": 6, "batch_size": 32, "lr": 1e-4, "relational_weight": 4_000.0}
# new models: the relational term and the pooled skip, chosen on two data sets with "tiny" (docs/models.md)
_SHORT = {"relational": True, "batch_size": 64, "schedule": "cosine", "warmup": 20, "max_len": 256}
RECIPES = {
    "tiny": Recipe({"pooled_skip": True, "dropout": 0.0}, {**_SHORT, "lr": 3e-3}, n_steps=500),
    "small": Recipe({"pooled_skip": True, "dropout": 0.0}, {**_SHORT, "lr": 1e-3}, n_steps=500),
    "base": Recipe({"pooled_skip": True}, {"relational": True}),
}
# the head is fitted beforehand (engine/head_start.py), and higher learning rates would first undo that
FINETUNE = {"epochs": 3, "batch_size": 32, "lr": 3e-5}

# values of the flag of a gene in the original: not perturbed, perturbed, padding
_N_FLAGS = 3

ValueStyle = Literal["continuous", "category", "scaling"]


@dataclass(frozen=True)
class Config(ModelConfig):
    """Architecture of scGPT; defaults are those of the published whole-human model.

    Parameters
    ----------
    d_hidden
        Width of the feed-forward layers.
    value_style
        How values are embedded: by a small network (``"continuous"``), by a table of bins (``"category"``), or as a
        factor of the gene embedding (``"scaling"``).
    n_value_bins
        Rows of the table of bins, including the one for masked values (``"category"`` only).
    mask_value
        Value that replaces a masked one.
    cell_decoder
        How expression is predicted from the cell embedding (MVC in the original). ``None``: not at all.
    explicit_zero_prob
        Whether a second head predicts the probability that a gene is zero.
    n_batches
        Number of experimental batches; 0 for none.
    batch_labels
        Whether the decoders read the batch.
    domain_norm
        Whether inputs are normalised within each batch (DSBN in the original).
    adversarial
        Whether an adversarial head predicts the batch from the cell embedding (DAB in the original).
    class_layers
        Number of layers of a published classification head.
    pooled_skip
        Whether ``<cls>`` starts from the normalised mean of the cell's gene embeddings, weighted by their values, in
        addition to its own embedding. Cell embeddings then learn faster. Published models do not have it.
    perturbed
        Names of the perturbations that the model was trained on; empty for models that predict no perturbations. Such a
        model reads a flag of each gene, and predicts expression after a perturbation by an affine function of that
        before (``TransformerGenerator`` in the original).
    n_decoders
        Number of affine decoders of an ensemble (1 in the original).
    n_covariates
        Length of the vector that describes a compound and its dose; 0 for perturbed genes.
    """

    dropout: float = 0.2
    d_hidden: int = 512
    value_style: ValueStyle = "continuous"
    n_value_bins: int = 52
    mask_value: int = -1
    cell_decoder: CellDecoder | None = "inner product"
    explicit_zero_prob: bool = False
    n_batches: int = 0
    batch_labels: bool = False
    domain_norm: bool = False
    adversarial: bool = False
    class_layers: int = 3
    pooled_skip: bool = False
    perturbed: tuple[str, ...] = ()
    n_decoders: int = 1
    n_covariates: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "perturbed", tuple(self.perturbed))
        if (self.batch_labels or self.domain_norm or self.adversarial) and self.n_batches < 1:
            raise ValueError(
                "Expected n_batches of at least 1 with batch_labels, domain_norm or adversarial, got "
                f"{self.n_batches}. Pass the number of batches."
            )
        if self.value_style == "category" and not 0 <= self.mask_value < self.n_value_bins:
            # the table has no row -1, so the row after the bins is for masked values
            object.__setattr__(self, "mask_value", self.n_value_bins - 1)

    def objective(self) -> dict[str, Any]:
        """Return the default pretraining objective."""
        return {"kind": "MaskedValue", "mask_ratio": (0.25, 0.5, 0.75), "from_cell": 1.0}

    def encoder(self) -> Encoder:
        """Return the default encoder, which turns counts into token sequences."""
        if self.value_style == "scaling":
            return ValueEncoder(max_len=1201, include_zeros=False)
        return BinEncoder()


class Model(CellModel):
    """scGPT: gene embedding + value embedding, ``<cls>`` first, post-norm blocks without positions."""

    family = "scgpt"
    unit_length = True
    head_pooling = "ranked"

    def __init__(self, config: Config, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        self.config: Config = config
        d = config.d_model
        self.gene_embedding = nn.Embedding(len(vocab), d)
        self.gene_norm = nn.LayerNorm(d)
        if config.value_style == "continuous":
            self.value_embedding: nn.Module = ValueNetwork(d, config.dropout)
        elif config.value_style == "category":
            self.value_embedding = BinTable(config.n_value_bins, d)
        if config.batch_labels:
            self.batch_embedding = nn.Sequential(nn.Embedding(config.n_batches, d), nn.LayerNorm(d))
        if config.domain_norm:
            # the original's batch norms have no weights
            self.domain_norms = nn.ModuleList(
                nn.BatchNorm1d(d, eps=6.1e-5, affine=False) for _ in range(config.n_batches)
            )
        if config.pooled_skip:
            self.pooled_norm = nn.LayerNorm(d)
        self.layers = nn.ModuleList(
            Block(d, heads, hidden, config.dropout, d_head=d // config.n_heads)
            for heads, hidden in config.block_sizes()
        )
        d_seen = 2 * d if config.batch_labels else d
        self.decoder = None if config.perturbed else mlp(d_seen, d)
        if config.perturbed:
            self.flag_embedding = nn.Embedding(_N_FLAGS, d)
            self.coefficients = nn.ModuleList(mlp(d, d) for _ in range(config.n_decoders))
            self.offsets = nn.ModuleList(mlp(d, d) for _ in range(config.n_decoders))
        if config.n_covariates:
            self.covariate_embedding = nn.Sequential(nn.Linear(config.n_covariates, d), nn.LayerNorm(d))
            self.register_buffer("covariates", torch.zeros(len(config.perturbed), config.n_covariates))
        self.zero_decoder = mlp(d_seen, d) if config.explicit_zero_prob else None
        self.cell_decoder = None
        if config.cell_decoder is not None:
            self.cell_decoder = CellToGenes(config.cell_decoder, d, d_seen, config.explicit_zero_prob)
        self.batch_head = ClassHead(d, config.n_batches, 3, nn.LeakyReLU) if config.adversarial else None
        self._initialise()

    def _initialise(self) -> None:
        # as in the original: a narrow uniform table, PyTorch's defaults elsewhere
        nn.init.uniform_(self.gene_embedding.weight, -0.1, 0.1)

    @property
    def blocks(self) -> Sequence[Any]:
        """Transformer blocks, first to last."""
        return list(self.layers)

    def gene_table(self) -> Tensor:
        """Return the embedding of each token before the norm, ``(n_tokens, d)``."""
        return self.gene_embedding.weight

    def new_head(self, n_outputs: int) -> nn.Module:
        """Make a classifier like that of the original."""
        return ClassHead(self.config.d_model, n_outputs, self.config.class_layers, nn.ReLU)

    def embed_genes(self, genes: Tensor) -> Tensor:
        """Embed genes as the blocks read them, any shape to ``(..., d)``."""
        return self.gene_norm(self.gene_embedding(genes))

    def inputs(self, batch: Batch) -> Tensor:
        """Compute the input embeddings of the first block, ``(t, d)``."""
        genes = self.embed_genes(batch.genes)
        if batch.values is None:
            raise ValueError("Expected a value for each gene, but this batch has none. Encode with a BinEncoder.")
        if self.config.value_style == "scaling":
            x = genes * batch.values[:, None].to(genes.dtype)
        else:
            x = genes + self.value_embedding(batch.values)
        if self.config.pooled_skip:
            x = x.index_add(0, batch.first, self._pooled(genes, batch).to(x.dtype))
        return self._normalise_domains(x, batch) if self.config.domain_norm else x

    def _pooled(self, genes: Tensor, batch: Batch) -> Tensor:
        """Compute the normalised mean of each cell's gene embeddings, weighted by the values shown, ``(b, d)``."""
        assert batch.values is not None
        shown = self.is_expressed(batch) & (batch.values != self.config.mask_value)
        weight = batch.values.float() * shown
        total = torch.zeros(batch.n_cells, genes.shape[1], device=genes.device)
        total = total.index_add(0, batch.cell, genes.float() * weight[:, None])
        sums = torch.zeros_like(total[:, 0]).index_add(0, batch.cell, weight)
        return self.pooled_norm(total / sums.clamp(min=1e-6)[:, None])

    def forward(self, batch: Batch) -> Outputs:
        """Compute predictions for every token and every cell."""
        hidden = self.hidden(batch)
        cell = hidden[batch.first]
        heads = self.decode_cell(cell, batch.genes, batch.cell, batch)
        if self.decoder is not None:
            heads |= self.decode(hidden, batch.cell, batch)
        if self.batch_head is not None:
            heads["batch"] = self.batch_head(GradientReversal.apply(cell))
        return Outputs(hidden, cell, heads | self.head_outputs_after(hidden, batch))

    @entry
    def decode(self, hidden: Tensor, cell_of: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Predict ``value`` and ``zero`` logits from hidden states of tokens ``(n, d)`` of the cells ``cell_of``."""
        if self.config.batch_labels:
            hidden = torch.cat([hidden, self.batch_embedding(batch.experiment)[cell_of]], dim=1)
        if self.decoder is None:
            raise ValueError(
                "This scgpt model predicts expression after perturbations only. Use tl.predict_perturbation, or the "
                "model that it was trained from."
            )
        predicted = {"value": self.decoder(hidden).squeeze(1)}
        if self.zero_decoder is not None:
            predicted["zero"] = self.zero_decoder(hidden).squeeze(1)
        return predicted

    @entry
    def decode_cell(self, cell: Tensor, genes: Tensor, cell_of: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Predict values of ``genes`` ``(n,)`` from the embeddings of the cells ``cell_of``."""
        if self.cell_decoder is None:
            return {}
        if self.config.batch_labels:
            cell = torch.cat([cell, self.batch_embedding(batch.experiment)], dim=1)
        return self.cell_decoder(cell, self.embed_genes(genes), cell_of)

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Predict values of the tokens ``at``, ``(n,)``; with ``hide``, these are masked in the input."""
        if hide:
            assert batch.values is not None
            batch = batch.with_values(batch.values.index_fill(0, at, self.config.mask_value))
        return self.decode(self.hidden(batch)[at], batch.cell[at], batch)["value"]

    def reconstruct_genes(self, batch: Batch, genes: Tensor) -> Tensor:
        """Predict values of chosen genes from the cell embedding, ``(b, g)``."""
        cell_of = torch.arange(batch.n_cells, device=genes.device).repeat_interleave(len(genes))
        cell = self.embed(batch, pooling=self.pooling)
        predicted = self.decode_cell(cell, genes.repeat(batch.n_cells), cell_of, batch)
        if "cell_value" not in predicted:
            return super().reconstruct_genes(batch, genes)
        return predicted["cell_value"].view(batch.n_cells, -1)

    @entry
    def predict_perturbed(self, batch: Batch, flags: Tensor, covariate: Tensor | None = None) -> Tensor:
        """Predict the value of each token after a perturbation with each decoder, ``(n_decoders, t)``.

        Parameters
        ----------
        batch
            Cells before the perturbation.
        flags
            1 for tokens of perturbed genes and 0 for others, ``(t,)``.
        covariate
            Vector of the compound and its dose of each cell, ``(b, n_covariates)``; NaN for cells without one.
        """
        assert batch.values is not None
        x = self.inputs(batch) + self.flag_embedding(flags)
        if covariate is not None:
            treated = covariate.isfinite().all(1, keepdim=True)
            x = x + (self.covariate_embedding(covariate.nan_to_num()) * treated)[batch.cell]
        for block in self.blocks:
            x = block(x, batch)
        value = batch.values.to(x.dtype)
        decoders = zip(self.coefficients, self.offsets, strict=True)
        return torch.stack([factor(x)[:, 0] * value + offset(x)[:, 0] for factor, offset in decoders])

    def value_losses(self, from_cell: bool) -> tuple[str, ...]:
        """Return the names of the losses that :class:`scllm.engine.objectives.MaskedValue` computes."""
        names = ["mse"] + ["zero"] * self.config.explicit_zero_prob
        if from_cell and self.cell_decoder is not None:
            names += ["mse_cell"] + ["zero_cell"] * self.config.explicit_zero_prob
        return tuple(names)

    def _normalise_domains(self, x: Tensor, batch: Batch) -> Tensor:
        """Normalise each experimental batch by its own statistics; a mini-batch may hold cells of several."""
        domain = batch.experiment[batch.cell]
        normalised = torch.empty_like(x)
        for label in domain.unique().tolist():
            of_label = domain == label
            normalised[of_label] = self.domain_norms[label](x[of_label])
        return normalised

    def write_original(self, path: Path) -> None:
        """Write ``args.json``, ``vocab.json`` and ``best_model.pt`` as the scGPT package reads them."""
        write(self, path)


# --- the original's checkpoint folders ---

# names in scGPT's state dict and ours; the first match is used, for reading and for writing
_NAMES: tuple[tuple[str, str], ...] = (
    ("encoder.embedding.", "gene_embedding."),
    ("encoder.enc_norm.", "gene_norm."),
    ("value_encoder.linear1.", "value_embedding.up."),
    ("value_encoder.linear2.", "value_embedding.out."),
    ("value_encoder.norm.", "value_embedding.norm."),
    ("value_encoder.embedding.", "value_embedding.table."),
    ("value_encoder.enc_norm.", "value_embedding.norm."),
    ("batch_encoder.embedding.", "batch_embedding.0."),
    ("batch_encoder.enc_norm.", "batch_embedding.1."),
    ("dsbn.bns.", "domain_norms."),
    ("transformer_encoder.layers.#.self_attn.Wqkv.", "layers.#.attention.qkv."),
    ("transformer_encoder.layers.#.self_attn.in_proj_", "layers.#.attention.qkv."),
    ("transformer_encoder.layers.#.self_attn._impl.Wqkv.", "layers.#.attention.qkv."),
    ("transformer_encoder.layers.#.self_attn.out_proj.", "layers.#.attention.out."),
    ("transformer_encoder.layers.#.linear1.", "layers.#.up."),
    ("transformer_encoder.layers.#.linear2.", "layers.#.down."),
    ("transformer_encoder.layers.#.norm", "layers.#.norm"),
    ("pert_encoder.", "flag_embedding."),
    ("decoder.coeff_decoder.fc.", "coefficients.0."),
    ("decoder.bias_decoder.fc.", "offsets.0."),
    ("decoder.fc.", "decoder."),
    ("decoder.zero_logit.", "zero_decoder."),
    ("cls_decoder._decoder.", "heads.0.layers."),
    ("cls_decoder.out_layer.", "heads.0.out."),
    ("mvc_decoder.gene2query.", "cell_decoder.query."),
    ("mvc_decoder.W.", "cell_decoder.weight."),
    ("mvc_decoder.W_zero_logit.", "cell_decoder.zero_weight."),
    ("mvc_decoder.fc1.", "cell_decoder.up."),
    ("mvc_decoder.hidden_activation.", "cell_decoder.activation."),
    ("mvc_decoder.fc2.", "cell_decoder.out."),
    ("grad_reverse_discriminator._decoder.", "batch_head.layers."),
    ("grad_reverse_discriminator.out_layer.", "batch_head.out."),
)
# left over from generative pretraining, used by no public model class
_UNUSED = ("flag_encoder.",)
_SPECIALS = ("<pad>", "<cls>", "<eoc>")
_SETTINGS = {"nlayers": int, "nheads": int, "embsize": int, "d_hid": int}
# names of the same settings in the training scripts that come with scGPT, and in other tools
_OTHER_NAMES = {
    "nlayers": ("n_layers", "num_layers"),
    "nheads": ("nhead", "n_heads", "n_head", "num_heads"),
    "embsize": ("layer_size", "emb_size", "d_model"),
    "d_hid": ("layer_size", "d_hidden", "hidden_size"),
}


def read(path: str | Path) -> Checkpoint:
    """Read a folder of the scGPT package: ``args.json``, ``vocab.json`` and ``best_model.pt``."""
    path = Path(path)
    for name in ("args.json", "vocab.json", "best_model.pt"):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path / name} is not there; an scGPT folder holds args.json, vocab.json and best_model.pt. "
                "Pass the folder that holds all three."
            )
    args = read_json(path / "args.json")
    require(args, _SETTINGS, path / "args.json", others=_OTHER_NAMES)
    vocab = read_vocab(path / "vocab.json")
    original = plain_weights(read_torch(path / "best_model.pt"), path / "best_model.pt")
    weights = {_ours(name): tensor for name, tensor in original.items() if not name.startswith(_UNUSED)}
    config = _config(args, weights)
    encoder = _encoder(args, config)
    if "heads.0.out.weight" not in weights:
        return Checkpoint(config, vocab, encoder, weights)
    classes = tuple(map(str, range(len(weights["heads.0.out.weight"]))))
    return Checkpoint(config, vocab, encoder, weights, (HeadSpec("cls", classes),))


def write(model: Model, path: Path) -> None:
    """Write a folder that the scGPT package and :func:`read` can read."""
    config, encoder = model.config, model.encoder
    if config.pooled_skip:
        raise ValueError("scGPT's format holds no models with pooled_skip=True. Use format='native'.")
    if len(model.heads) > 1:
        raise ValueError(
            f"scGPT's format holds one classification head, but the model has {len(model.heads)}. Use format='native'."
        )
    if model.heads and model.head_specs[0].pooling not in (None, "cls"):
        raise ValueError(
            "scGPT's format holds a head on <cls>, but this head reads a mean over genes. Fine-tune with "
            "head_reads='published', or use format='native'."
        )
    args: dict[str, Any] = {
        "embsize": config.d_model,
        "nheads": config.n_heads,
        "d_hid": config.d_hidden,
        "nlayers": config.n_layers,
        "n_layers_cls": config.class_layers,
        "dropout": config.dropout,
        "pad_token": "<pad>",
        "pad_value": getattr(encoder, "cls_value", -2),
        "mask_value": config.mask_value,
        "n_bins": getattr(encoder, "n_bins", 51),
        "max_seq_len": encoder.max_len - 1,
        "input_style": "binned" if isinstance(encoder, BinEncoder) else "log1p",
        "input_emb_style": config.value_style,
        "include_zero_gene": getattr(encoder, "include_zeros", False),
        "ties": getattr(encoder, "ties", "middle"),
        "MVC": config.cell_decoder is not None,
        "mvc_decoder_style": config.cell_decoder,
        "training_tasks": "both",
        "explicit_zero_prob": config.explicit_zero_prob,
        "mask_ratio": [0.25, 0.5, 0.75],
    }
    weights = {_theirs(name): tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    tokens, table = _with_specials(model.vocab.tokens), weights["encoder.embedding.weight"]
    weights["encoder.embedding.weight"] = nn.functional.pad(table, (0, 0, 0, len(tokens) - len(table)))
    path.mkdir(parents=True, exist_ok=True)
    (path / "args.json").write_text(json.dumps(args, indent=1))
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    torch.save(weights, path / "best_model.pt")


def read_vocab(path: Path) -> Vocab:
    """Read scGPT's ``{symbol: id}`` file."""
    tokens = read_tokens(path)
    if isinstance(tokens, dict):
        raise ValueError(
            f"Expected scGPT's dictionary of symbols and ids, but {path} is a vocabulary that scllm wrote. Leave "
            "family= out."
        )
    return Vocab(_with_specials(tokens), mask=None)


def _with_specials(tokens: Sequence[str]) -> tuple[str, ...]:
    """Append missing special tokens, as the scGPT package does when it reads a vocabulary."""
    return (*tokens, *(token for token in _SPECIALS if token not in tokens))


def _ours(name: str) -> str:
    return renamed(name, [(theirs, ours) for theirs, ours in _NAMES])


def _theirs(name: str) -> str:
    # several of their names may map to one of ours; the first is that of the release
    return renamed(name, [(ours, theirs) for theirs, ours in _NAMES])


def _config(args: dict[str, Any], weights: dict[str, Tensor]) -> Config:
    """Read the architecture: sizes from the settings, optional parts from the weights."""
    style: CellDecoder | None = None
    if "cell_decoder.weight.weight" in weights:
        style = args.get("mvc_decoder_style") or "inner product"
    elif "cell_decoder.up.weight" in weights:
        style = "concat query" if len(weights["cell_decoder.query.weight"]) == 64 else "sum query"
        style = args.get("mvc_decoder_style") or style
    config = Config(
        n_layers=args["nlayers"],
        n_heads=args["nheads"],
        d_model=args["embsize"],
        dropout=args.get("dropout", 0.2),
        d_hidden=args["d_hid"],
        value_style=args.get("input_emb_style", "continuous"),
        mask_value=args.get("mask_value", -1),
        cell_decoder=style,
        explicit_zero_prob="zero_decoder.0.weight" in weights,
        class_layers=args.get("n_layers_cls", 3),
        # the original does not store which perturbations it was trained on
        perturbed=("unknown",) if "flag_embedding.weight" in weights else (),
    )
    if config.value_style == "category":
        config = replace(config, n_value_bins=len(weights["value_embedding.table.weight"]))
    domains = {name.split(".")[1] for name in weights if name.startswith("domain_norms.")}
    known = [len(weights.get(name, ())) for name in ("batch_embedding.0.weight", "batch_head.out.bias")]
    return replace(
        config,
        n_batches=max(len(domains), *known),
        batch_labels="batch_embedding.0.weight" in weights,
        domain_norm=bool(domains),
        adversarial="batch_head.out.bias" in weights,
    )


def _encoder(args: dict[str, Any], config: Config) -> Encoder:
    """Make the encoder of the original's embedding code: random ties, ``<cls>`` with the padding value, 1,200 genes."""
    max_len = args.get("max_seq_len", 1200) + 1
    cls_value = args.get("pad_value", -2)
    zeros = bool(args.get("include_zero_gene", False))
    if config.value_style == "scaling":
        return ValueEncoder(max_len=max_len, cls_value=cls_value, include_zeros=zeros)
    ties = args.get("ties", "random")
    if config.value_style == "category":
        cls_value = 0  # the table of bins has no row for negative values
    return BinEncoder(args.get("n_bins", 51), max_len, ties, cls_value, zeros)
