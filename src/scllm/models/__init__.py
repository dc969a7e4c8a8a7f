"""Model families: build one, load one, save one."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from inspect import signature
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from scllm.data.encode import (
    BinEncoder,
    DepthEncoder,
    Encoder,
    LevelEncoder,
    RankEncoder,
    ValueEncoder,
    encoder_from_dict,
)
from scllm.data.run_files import read_history, read_report
from scllm.data.vocab import Vocab
from scllm.models.base import CellModel, Checkpoint, HeadSpec
from scllm.models.int8 import prepare_int8
from scllm.models.storage import HUB, from_hub, is_native, load_weights, read_native

__all__ = [
    "BinEncoder", "CellModel", "DepthEncoder", "LevelEncoder", "RankEncoder", "ValueEncoder", "Vocab", "build",
    "families", "load",
]  # fmt: skip


def families() -> list[str]:
    """Names of the model families that come with scllm.

    Examples
    --------
    >>> "scgpt" in families()
    True
    """
    here = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in here if hasattr(import_module(f"{__name__}.{name}"), "Config")]


def family_module(family: str) -> ModuleType:
    """The module of a family; a name with a dot is a module of another package, and is imported as it is."""
    if "." in family:
        return import_module(family)
    if family not in families():
        raise ValueError(
            f"there is no model family {family!r}, one of {families()} expected. A family of your own package is named "
            "with its module, for example 'mylab.model'."
        )
    return import_module(f"{__name__}.{family}")


def build(
    family: str,
    *,
    vocab: Vocab | Iterable[str] | str | PathLike[str],
    encoder: Encoder | None = None,
    size: str = "base",
    **config: Any,
) -> CellModel:
    """Build a model with fresh weights.

    Parameters
    ----------
    family
        One of :func:`families`, or the module of your own family (``"mylab.model"``).
    vocab
        The vocabulary, or gene names to make one of; or the path of a vocabulary file.
    encoder
        How counts become sentences; ``None`` is the family's own.
    size
        A named architecture of the family (``"tiny"``, ``"small"``, ``"base"``).
    **config
        Fields of the family's ``Config``, over those of ``size``; ``"gpt2"`` takes any causal or masked language
        model of transformers by its configuration, ``hf_config=``.

    Returns
    -------
    An untrained :class:`CellModel`. Weights are drawn from torch's global generator: seed it for equal ones.

    Examples
    --------
    >>> build("scgpt", vocab=["CD3E", "LYZ"], size="tiny").config.d_model
    64
    """
    module = family_module(family)
    if size not in module.SIZES:
        raise ValueError(
            f"{family} has no size {size!r}, one of {sorted(module.SIZES)} expected. Pass one of them with size=, and "
            "what should differ from it as settings."
        )
    known = {field.name for field in fields(module.Config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise TypeError(
            f"{family} has no setting {unknown[0]!r}, one of {sorted(known)} expected. Mend its name, or leave it out."
        )
    settings = module.Config(**{**module.SIZES[size], **config})
    if isinstance(vocab, (str, PathLike)):
        vocab = Vocab.read(vocab)
    vocab = vocab if isinstance(vocab, Vocab) else settings.vocab(vocab)
    return module.Model(settings, vocab, encoder if encoder is not None else settings.encoder())


def load(
    path: str | PathLike[str] | CellModel,
    *,
    family: str | None = None,
    vocab: Vocab | Mapping[str, int] | Iterable[str] | str | PathLike[str] | None = None,
    medians: Mapping[str, float] | str | PathLike[str] | None = None,
    part: str | None = None,
    ignore: Iterable[str] = (),
) -> CellModel:
    """Load a model; nothing in the files is executed.

    Parameters
    ----------
    path
        A folder that scllm wrote (a model or a run directory), or a published checkpoint, also on the Hugging Face Hub
        (``"hf://owner/name"``). A model is given back.
    family
        Which published format it is; native folders say so themselves.
    vocab
        Vocabulary of a published checkpoint that comes without one, or that replaces its own: a :class:`Vocab`, gene
        names in their order, ``{token: id}``, or the path of such a file (geneformer: medians, Ensembl mapping and
        the dictionary of symbols are then looked for beside it too).
    medians
        Gene medians by name, or the path of such a dictionary (geneformer).
    part
        Which of several models in a file (scfoundation: ``"cell"``, ``"rde"``, ``"gene"``); ``None`` is the first of
        those.
    ignore
        Prefixes of weight names that may be missing or left over.

    Returns
    -------
    The model, in evaluation mode, on the CPU.

    Examples
    --------
    >>> import tempfile
    >>> model = scllm.models.build("scgpt", vocab=["CD3D", "CD19"], size="tiny")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/model")
    ...     scllm.models.load(f"{folder}/model").hash() == model.hash()
    True
    """
    if isinstance(path, CellModel):
        return path
    folder = _folder(from_hub(str(path)) if str(path).startswith(HUB) else Path(path))
    if family is None or is_native(folder):
        if vocab is not None or medians is not None or part is not None:
            raise ValueError(
                "vocab=, medians= and part= go with published checkpoints, which family= names; a model that scllm "
                "wrote holds all there is. Leave them out."
            )
        return _load_native(folder, ignore, family)
    module = family_module(family)
    if not hasattr(module, "read"):
        raise ValueError(f"{family} has no published format that scllm reads. Load a native folder without family=.")
    known = signature(module.read).parameters
    asked = {"vocab": vocab, "medians": medians, "part": part}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    surplus = sorted(set(given) - set(known) - {"vocab"})
    if surplus:
        raise ValueError(f"{surplus[0]}= is given, and a {family} checkpoint has no choice of that. Leave it out.")
    if "vocab" in given and "medians" not in known:
        given["vocab"] = _vocab(given["vocab"])
    checkpoint: Checkpoint = module.read(folder, **{name: given[name] for name in given if name in known})
    vocabulary = given["vocab"] if "vocab" in given and "vocab" not in known else checkpoint.vocab
    model = _filled(module, checkpoint, vocabulary, folder, ignore)
    # remembered by its path only where that alone finds the same model again
    model.path = None if given else folder.absolute()
    return model


def _vocab(names: Vocab | Iterable[str] | str | PathLike[str]) -> Vocab:
    if isinstance(names, Vocab):
        return names
    return Vocab.read(names) if isinstance(names, (str, PathLike)) else Vocab.from_tokens(names)


def _folder(path: Path) -> Path:
    """The model folder itself, also where a run directory was given."""
    if not path.exists():
        advice = f"Train a {path} model with tl.pretrain first." if str(path) in families() else "Check the path."
        raise FileNotFoundError(f"{path} is not there, a model folder or run directory expected. {advice}")
    if (path / "spec.json").is_file():
        if not (path / "done").exists():
            raise ValueError(
                f"{path} is a run that is not done, a finished run expected. Continue it with the same call of the "
                f"verb, or `scllm run {path}`."
            )
        return path / "model"
    return path


def _load_native(folder: Path, ignore: Iterable[str], family: str | None) -> CellModel:
    if not is_native(folder):
        raise ValueError(
            f"{folder} does not hold a model that scllm wrote (config.json with weights.safetensors). For a published "
            f"checkpoint say which with family=, one of {families()}."
        )
    config, vocab, weights, arrays = read_native(folder)
    saved = config["family"]
    if family not in (None, saved):
        raise ValueError(f"{folder} holds a {saved!r} model, family={family!r} was asked for. Leave family= out.")
    if "." in saved and family is None:
        # a family outside this package is imported only when the caller passes it, never because a file says so
        raise ValueError(
            f"{folder} holds a model of the family {saved!r} from another package. If you trust it, pass "
            f"family={saved!r}."
        )
    module = family_module(saved)
    unknown = sorted(set(config["config"]) - {field.name for field in fields(module.Config)})
    if unknown:
        raise ValueError(
            f"{folder} has the setting {unknown[0]!r}, one that {saved} models of this version of scllm have expected. "
            "Load it with the version that wrote it, or train it again."
        )
    heads = tuple(
        HeadSpec(**{**spec, "classes": None if spec["classes"] is None else tuple(spec["classes"])})
        for spec in config["heads"]
    )
    checkpoint = Checkpoint(
        module.Config(**config["config"]),
        Vocab.from_dict(vocab),
        encoder_from_dict(config["encoder"], arrays),
        weights,
        heads,
    )
    model = _filled(module, checkpoint, checkpoint.vocab, folder, ignore, config.get("weight_dtype", "float32"))
    model.report = read_report(folder / "report.json")
    model.history = read_history(folder / "history.jsonl")
    model.path = folder.absolute()
    return model


def _filled(
    module: ModuleType,
    checkpoint: Checkpoint,
    vocab: Vocab,
    folder: Path,
    ignore: Iterable[str],
    weight_dtype: str = "float32",
) -> CellModel:
    """A model with the weights of a checkpoint; the caller's random state stays as it was."""
    with torch.random.fork_rng([]):
        model: CellModel = module.Model(checkpoint.config, vocab, checkpoint.encoder)
        model.set_heads(checkpoint.heads)
        prepare_int8(model, weight_dtype, checkpoint.weights)
    load_weights(model, checkpoint.weights, source=folder, ignore=ignore)
    return model.eval()
