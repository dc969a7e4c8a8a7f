"""Read and write Geneformer's Hugging Face folders and dictionaries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scllm._typing import FloatArray
from scllm.data.dictionaries import read_dictionary
from scllm.data.encode import RankEncoder
from scllm.data.genes import id_type
from scllm.data.vocab import Vocab
from scllm.models.base import HeadSpec
from scllm.models.storage import plain_weights, read_json, read_torch, renamed, require

if TYPE_CHECKING:
    from scllm.models.geneformer import Model

__all__ = ["MedianLike", "VocabLike", "read_folder", "write"]

VocabLike = Vocab | Mapping[str, int] | str | PathLike[str]
MedianLike = Mapping[str, float] | str | PathLike[str]

# names in BERT's state dict and ours; attention projections are also joined
_NAMES: tuple[tuple[str, str], ...] = (
    ("bert.embeddings.word_embeddings.", "token_embedding."),
    ("bert.embeddings.position_embeddings.", "position_embedding."),
    ("bert.embeddings.token_type_embeddings.", "type_embedding."),
    ("bert.embeddings.LayerNorm.", "norm."),
    ("bert.encoder.layer.#.attention.output.dense.", "layers.#.attention.out."),
    ("bert.encoder.layer.#.attention.output.LayerNorm.", "layers.#.norm1."),
    ("bert.encoder.layer.#.intermediate.dense.", "layers.#.up."),
    ("bert.encoder.layer.#.output.dense.", "layers.#.down."),
    ("bert.encoder.layer.#.output.LayerNorm.", "layers.#.norm2."),
    ("cls.predictions.transform.dense.", "predictor.dense."),
    ("cls.predictions.transform.LayerNorm.", "predictor.norm."),
    ("cls.predictions.bias", "predictor.bias"),
    ("bert.pooler.dense.", "heads.0.pooler."),
)
_PARTS = ("query", "key", "value")
# copies of tied weights in pytorch_model.bin, and a table of 0, 1, 2, ... from older versions
_UNUSED = ("cls.predictions.decoder.", "bert.embeddings.position_ids")
_TOKENS, _MEDIANS, _MAPPING, _SYMBOLS = "token_dictionary", "gene_median", "ensembl_mapping", "gene_name_id"


def read_folder(
    path: Path, vocab: VocabLike | None, medians: MedianLike | None
) -> tuple[dict[str, Any], Vocab, RankEncoder, dict[str, Tensor], tuple[HeadSpec, ...]]:
    """Read architecture, vocabulary, encoder, renamed weights and heads of a Hugging Face folder."""
    settings, original = _settings(path), _weights(path)
    places = [path] + ([Path(vocab).parent] if isinstance(vocab, (str, PathLike)) else [])
    tokens = _vocabulary(vocab, places)
    table = original["bert.embeddings.word_embeddings.weight"]
    if len(tokens) != len(table):
        raise ValueError(
            f"Expected a token dictionary with {len(table)} tokens, as many as the model has, got {len(tokens)}. Pass "
            "the dictionary of this version with vocab= (V1: 25,426 tokens, V2: 20,275)."
        )
    weights = _ours(original)
    is_gene = "classifier.weight" in original and "bert.pooler.dense.weight" not in original
    classifier = "heads.0." if is_gene else "heads.0.out."
    weights = {name.replace("classifier.", classifier, 1): value for name, value in weights.items()}
    n_classes = len(original.get("classifier.weight", ()))
    config = {
        "n_layers": settings["num_hidden_layers"],
        "n_heads": settings["num_attention_heads"],
        "d_model": settings["hidden_size"],
        "d_hidden": settings["intermediate_size"],
        "dropout": settings.get("hidden_dropout_prob", 0.1),
        "max_len": settings["max_position_embeddings"],
        "specials": tokens.cls is not None,
        "lm_head": "predictor.bias" in weights,
    }
    encoder = RankEncoder(
        config["max_len"], tokens.cls is not None, tokens.eos is not None, _aligned(_medians(medians, places), tokens)
    )
    names = settings.get("id2label") or {}
    classes = tuple(str(names.get(str(i), i)) for i in range(n_classes))
    head = HeadSpec("gene_class", classes, level="gene") if is_gene else HeadSpec("cell_class", classes)
    return config, tokens, encoder, weights, (head,) if n_classes else ()


def write(model: Model, path: Path) -> None:
    """Write a folder that transformers and :func:`read_folder` can read."""
    config = model.config
    if len(model.heads) > 1:
        raise ValueError(
            f"Geneformer's format holds one head, but the model has {len(model.heads)} "
            f"({', '.join(spec.key for spec in model.head_specs)}). Use format='native'."
        )
    spec = model.head_specs[0] if model.heads else None
    if spec is not None and spec.level == "cell" and spec.pooling not in (None, "cls"):
        raise ValueError(
            "Geneformer's format holds a head on the first token, as in BertForSequenceClassification, but this head "
            "reads a mean over genes. Fine-tune with TrainConfig(head_reads='published'), or use format='native'."
        )
    kind = {None: "ForMaskedLM", "cell": "ForSequenceClassification", "gene": "ForTokenClassification"}[
        None if spec is None else spec.level
    ]
    settings: dict[str, Any] = {
        "architectures": [f"Bert{kind}"],
        "model_type": "bert",
        "hidden_act": "relu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "initializer_range": 0.02,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_hidden,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_len,
        "vocab_size": len(model.vocab),
        "pad_token_id": model.vocab.pad_id,
        "tie_word_embeddings": True,
    }
    if spec is not None:
        classes = spec.classes or ("value",)
        settings["id2label"] = {str(i): name for i, name in enumerate(classes)}
        settings["label2id"] = {name: i for i, name in enumerate(classes)}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings, indent=1))
    save_file(_theirs(model), path / "model.safetensors", metadata={"format": "pt"})
    vocab, medians = model.vocab, getattr(model.encoder, "medians", None)
    (path / f"{_TOKENS}.json").write_text(json.dumps({token: i for i, token in enumerate(vocab.tokens)}))
    for name, kind in ((_MAPPING, "ensembl"), (_SYMBOLS, "symbol")):
        aliases = {alias: gene for alias, gene in vocab.aliases.items() if id_type([alias]) == kind}
        if aliases:
            (path / f"{name}_dict.json").write_text(json.dumps(aliases))
    if medians is not None:
        known = {token: float(value) for token, value in zip(vocab.tokens, medians, strict=True) if np.isfinite(value)}
        (path / f"{_MEDIANS}_dictionary.json").write_text(json.dumps(known))


def _settings(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"Expected a Geneformer folder with config.json and model.safetensors, but {path / 'config.json'} does not "
            "exist. Pass the folder of one model."
        )
    settings = read_json(path / "config.json")
    wanted = {
        "model_type": "bert",
        "hidden_act": "relu",
        "position_embedding_type": "absolute",
        "layer_norm_eps": 1e-12,
    }
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"Expected {name}={value!r}, as in Geneformer, but {path / 'config.json'} has {settings[name]!r}. "
                "Pass the folder of a Geneformer model."
            )
    sizes = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "max_position_embeddings")
    require(settings, dict.fromkeys(sizes, int), path / "config.json")
    return settings


def _weights(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors"
    if not file.is_file():
        original = read_torch(path / "pytorch_model.bin")
    else:
        try:
            original = load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"Expected a complete safetensors file, but {file} cannot be read ({error}). It is truncated, or only "
                "a Git LFS pointer: download it again."
            ) from error
    original = plain_weights(original, path)
    if "bert.embeddings.word_embeddings.weight" not in original:
        raise ValueError(
            f"Expected a BERT model with a gene table, but {path} holds other weights (first: "
            f"{next(iter(original), None)!r}). Pass the folder of a Geneformer model."
        )
    return {name: value for name, value in original.items() if not name.startswith(_UNUSED)}


def _ours(original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {renamed(name, _NAMES): value for name, value in original.items()}
    for name in [name for name in weights if ".attention.self.query." in name]:
        parts = [weights.pop(name.replace(".query.", f".{part}.")) for part in _PARTS]
        layer, what = name.split(".")[3], name.split(".")[-1]
        weights[f"layers.{layer}.attention.qkv.{what}"] = torch.cat(parts)
    return weights


def _theirs(model: Model) -> dict[str, Tensor]:
    table = [(ours, theirs) for theirs, ours in _NAMES]
    table += [("heads.0.out.", "classifier."), ("heads.0.", "classifier.")]
    weights = {renamed(name, table): value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    for name in [name for name in weights if ".attention.qkv." in name]:
        _, layer, *_, what = name.split(".")
        for part, value in zip(_PARTS, weights.pop(name).chunk(3), strict=True):
            weights[f"bert.encoder.layer.{layer}.attention.self.{part}.{what}"] = value.clone()
    return weights


def _found(name: str, places: list[Path]) -> Path | None:
    """Find the dictionary whose file name begins with ``name``; more than one is an error."""
    for place in places:
        files = sorted(file for file in place.glob(f"{name}*") if file.name.endswith((".json", ".json.gz", ".pkl")))
        if len(files) > 1:
            ways = {_TOKENS: "Pass the right one with vocab=.", _MEDIANS: "Pass the right one with medians=."}
            raise ValueError(
                f"Expected one dictionary {name}* in {place}, got {len(files)}: {[file.name for file in files]}. "
                f"{ways.get(name, 'Keep only that of this version.')}"
            )
        if files:
            return files[0]
    return None


def _vocabulary(given: VocabLike | None, places: list[Path]) -> Vocab:
    if isinstance(given, Vocab):
        return given
    if isinstance(given, Mapping):
        vocab = Vocab.from_tokens(sorted(given, key=given.__getitem__))
    else:
        file = Path(given) if given is not None else _found(_TOKENS, places)
        if file is None:
            raise FileNotFoundError(
                f"Expected a token dictionary ({_TOKENS}*.json or .pkl) in {places[0]}, but there is none. It names "
                "the gene of each token: pass the published dictionary of this version with vocab=."
            )
        vocab = Vocab.read(file)
    mapping, symbols = _names(_MAPPING, places), _names(_SYMBOLS, places)
    # the original looks up ids in upper case
    mapping |= {name.upper(): gene for name, gene in mapping.items()}
    aliases = {symbol: mapping.get(gene, gene) for symbol, gene in symbols.items()} | mapping
    return Vocab(
        vocab.tokens,
        vocab.pad,
        vocab.mask,
        vocab.cls,
        vocab.eos,
        {name: gene for name, gene in aliases.items() if gene in vocab and name != gene},
    )


def _names(name: str, places: list[Path]) -> dict[str, str]:
    """Read a dictionary of alternative gene names; empty if there is none."""
    file = _found(name, places)
    return {} if file is None else {other: str(gene) for other, gene in read_dictionary(file).items()}


def _medians(given: MedianLike | None, places: list[Path]) -> Mapping[str, float]:
    if given is not None and not isinstance(given, (str, PathLike)):
        return given
    file = Path(given) if given is not None else _found(_MEDIANS, places)
    if file is None:
        raise FileNotFoundError(
            f"Expected gene medians ({_MEDIANS}*.json or .pkl) in {places[0]}, but there are none. Genes are ranked "
            "relative to their medians: pass the published dictionary of this version with medians=."
        )
    return read_dictionary(file)


def _aligned(medians: Mapping[str, float], vocab: Vocab) -> FloatArray:
    """Return the median of each token, NaN if it has none."""
    found = np.array([medians.get(token, np.nan) for token in vocab.tokens], np.float64)
    if not np.isfinite(found).any():
        raise ValueError(
            f"Expected medians of the {len(vocab.genes)} genes of the vocabulary, but none of them has one (first "
            f"gene: {vocab.genes[0]!r}, first median: {next(iter(medians.keys()), None)!r}). Pass matching ones."
        )
    return found
