"""Read and write the checkpoint folders of the scGPT package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scllm.data.encode import BinEncoder, Encoder, ValueEncoder
from scllm.data.vocab import Vocab, read_tokens
from scllm.models.base import Checkpoint, HeadSpec
from scllm.models.layers import CellDecoder
from scllm.models.scgpt_config import Config
from scllm.models.storage import plain_weights, read_json, read_torch, renamed, require

if TYPE_CHECKING:
    from scllm.models.scgpt import Model

__all__ = ["read", "write"]

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
        raise ValueError(
            "scGPT's format holds no models with pooled_skip=True. Use format='native', or pretrain with "
            "TrainConfig(relational=False)."
        )
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
