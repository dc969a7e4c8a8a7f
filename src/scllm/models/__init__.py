"""Build, load and list models."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from inspect import signature
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from scllm.data.encode import (
    BinEncoder,
    DepthEncoder,
    Encoder,
    LevelEncoder,
    RankEncoder,
    ValueEncoder,
    encoder_from_dict,
)
from scllm.data.run_files import read_history, read_ledger, read_report
from scllm.data.vocab import Vocab
from scllm.models.base import CellModel, Checkpoint, HeadSpec, ModelConfig
from scllm.models.int8 import prepare_int8
from scllm.models.known_cells import read_known_cells
from scllm.models.plausibility import Plausibility
from scllm.models.sharded import all_shards
from scllm.models.storage import HUB, KNOWN_CELLS, LEDGER, from_hub, is_native, load_weights, read_native, read_torch

__all__ = [
    "BinEncoder",
    "CellModel",
    "DepthEncoder",
    "LevelEncoder",
    "Plausibility",
    "RankEncoder",
    "ValueEncoder",
    "Vocab",
    "build",
    "families",
    "load",
]


_TRAINING_LENGTH = 512
# what a family's module defines, besides `read` for a published format
_FAMILY = ("Config", "Model", "SIZES", "PRETRAIN", "FINETUNE")
_CHECKPOINTS = {"best": "best_model.pt", "last": "last.pt"}


def families() -> list[str]:
    """List the model families that come with scllm.

    Examples
    --------
    >>> "scgpt" in families()
    True
    """
    here = [module.name for module in pkgutil.iter_modules(__path__)]
    return [name for name in here if hasattr(import_module(f"{__name__}.{name}"), "SIZES")]


def family_module(family: str) -> ModuleType:
    """Import the module of a family; a name with a dot is the module of another package."""
    if "." in family:
        return _checked(import_module(family), family)
    if family not in families():
        raise ValueError(
            f"Expected family to be one of {families()}, got {family!r}. For a family of your own package, pass its "
            "module, such as 'mylab.model'."
        )
    return import_module(f"{__name__}.{family}")


def _checked(module: ModuleType, family: str) -> ModuleType:
    """Return the module of a family from another package; raise if something is missing."""
    missing = [name for name in _FAMILY if not hasattr(module, name)]
    if missing:
        raise ValueError(
            f"Expected the module {family!r} to define {', '.join(_FAMILY)}, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Add {'it' if len(missing) == 1 else 'them'}, as in "
            "scllm.models.scgpt."
        )
    if getattr(module.Model, "family", None) != family:
        raise ValueError(
            f"Expected Model.family to be the name of its module, {family!r}, with which saved models are loaded, got "
            f"{getattr(module.Model, 'family', None)!r}. Set it."
        )
    return module


def training_length(family: str, config: ModelConfig) -> int | None:
    """Tokens of a cell that are read in training unless the caller says; ``None``: as many as the encoder gives.

    Models of the sizes ``"tiny"`` and ``"small"`` are for trying out, often on a CPU, where time grows with the tokens
    and soon with their square: they learn as much from a random subset of each cell (docs/performance.md).
    """
    sizes = family_module(family).SIZES
    for name in ("tiny", "small"):
        settings = sizes.get(name, {})
        if settings and all(getattr(config, field) == value for field, value in settings.items()):
            return _TRAINING_LENGTH
    return None


def build(
    family: str,
    *,
    vocab: Vocab | Iterable[str] | str | PathLike[str],
    encoder: Encoder | None = None,
    size: str = "base",
    **config: Any,
) -> CellModel:
    """Build an untrained model.

    Parameters
    ----------
    family
        One of :func:`families`, or the module of your own family (``"mylab.model"``).
    vocab
        A vocabulary, gene names to make one from, or the path of a vocabulary file.
    encoder
        Encoder that turns counts into token sequences. ``None``: the family's default.
    size
        A named architecture of the family (``"tiny"``, ``"small"``, ``"base"``).
    **config
        Fields of the family's ``Config`` that differ from ``size``. ``"gpt2"`` takes the configuration of any causal or
        masked language model of transformers as ``hf_config=``.

    Returns
    -------
    An untrained :class:`CellModel`. Its weights are drawn from torch's global generator; seed that for reproducible
    weights.

    Examples
    --------
    >>> build("scgpt", vocab=["CD3E", "LYZ"], size="tiny").config.d_model
    64
    """
    module = family_module(family)
    if size not in module.SIZES:
        raise ValueError(
            f"Expected size to be one of {sorted(module.SIZES)} for {family}, got {size!r}. Pass one of these, and "
            "settings that differ from it as keywords."
        )
    known = {field.name for field in fields(module.Config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise TypeError(
            f"{family} has no setting {unknown[0]!r}. Expected one of {sorted(known)}. Correct it or leave it out."
        )
    if hasattr(vocab, "var_names"):
        raise TypeError(
            f"Expected vocab to be a vocabulary, its path or gene names, got an object of type {type(vocab).__name__}. "
            "Pass vocab=adata.var_names."
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
    checkpoint: Literal["best", "last"] | None = None,
    ignore: Iterable[str] = (),
) -> CellModel:
    """Load a model, without executing anything in its files.

    Parameters
    ----------
    path
        A folder that scllm wrote (model or run directory), or a published checkpoint, which may be on the Hugging Face
        Hub (``"hf://owner/name"``). A model is returned as it is.
    family
        Format of a published checkpoint. Folders that scllm wrote name their family themselves.
    vocab
        Vocabulary of a published checkpoint, if it has none or to replace its own: a :class:`Vocab`, gene names in
        order, ``{token: id}``, or the path of such a file. For geneformer, the folder of that file is also searched for
        medians, the Ensembl mapping and the dictionary of symbols.
    medians
        Gene medians by name, or the path of such a dictionary (geneformer).
    part
        Which of several models in a file to load (scfoundation: ``"cell"``, ``"rde"``, ``"gene"``). ``None``: the first
        of these.
    checkpoint
        Weights of a run that has not finished: those with the lowest validation loss so far (``"best"``), or of the
        last checkpoint (``"last"``). ``None``: the model of a finished run.
    ignore
        Prefixes of weight names that may be missing or unused.

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
    if checkpoint is not None:
        if vocab is not None or medians is not None or part is not None:
            raise ValueError(
                "Expected no vocab=, medians= or part= with checkpoint=, because a run that scllm wrote contains them. "
                "Leave them out."
            )
        return _load_unfinished(Path(path), checkpoint, family)
    folder = _folder(from_hub(str(path)) if str(path).startswith(HUB) else Path(path))
    if family is None or is_native(folder):
        if vocab is not None or medians is not None or part is not None:
            raise ValueError(
                "Expected vocab=, medians= and part= only for published checkpoints with family=. A model that scllm "
                "wrote contains them: leave them out."
            )
        return _load_native(folder, ignore, family)
    module = family_module(family)
    if not hasattr(module, "read"):
        raise ValueError(
            f"scllm reads no published format of {family}. To load a folder that scllm wrote, leave family= out."
        )
    known = signature(module.read).parameters
    asked = {"vocab": vocab, "medians": medians, "part": part}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    surplus = sorted(set(given) - set(known) - {"vocab"})
    if surplus:
        raise ValueError(f"A {family} checkpoint does not take {surplus[0]}=. Leave it out.")
    if "vocab" in given and "medians" not in known:
        given["vocab"] = _vocab(given["vocab"])
    read: Checkpoint = module.read(folder, **{name: given[name] for name in given if name in known})
    vocabulary = given["vocab"] if "vocab" in given and "vocab" not in known else read.vocab
    model = _filled(module, read, vocabulary, folder, ignore)
    # the path is recorded only if the path alone is enough to load the same model again
    model.path = None if given else folder.absolute()
    return model


def _vocab(names: Vocab | Iterable[str] | str | PathLike[str]) -> Vocab:
    if isinstance(names, Vocab):
        return names
    return Vocab.read(names) if isinstance(names, (str, PathLike)) else Vocab.from_tokens(names)


def _folder(path: Path) -> Path:
    """Return the model folder itself, also if a run directory was passed."""
    if not path.exists():
        advice = f"Train a {path} model with tl.pretrain first." if str(path) in families() else "Check the path."
        raise FileNotFoundError(f"Expected a model folder or run directory at {path}, but it does not exist. {advice}")
    if (path / "spec.json").is_file():
        if not (path / "done").exists():
            raise ValueError(
                f"Expected a finished run, but the run in {path} is not finished. Resume it with the call that started "
                f"it, or with `scllm run {path}`, or load the weights so far with checkpoint='best' or 'last'."
            )
        return path / "model"
    return path


def _load_unfinished(run: Path, checkpoint: str, family: str | None) -> CellModel:
    """Load the weights that a run has saved so far."""
    if checkpoint not in _CHECKPOINTS:
        raise ValueError(
            f"Expected checkpoint to be one of {list(_CHECKPOINTS)}, got {checkpoint!r}. Pass one of these."
        )
    if not (run / "spec.json").is_file():
        raise ValueError(
            f"Expected a run directory with checkpoint={checkpoint!r}, but {run} holds no spec.json. Leave checkpoint= "
            "out to load a model folder."
        )
    file = run / _CHECKPOINTS[checkpoint]
    if not file.exists():
        raise FileNotFoundError(
            f"Expected the checkpoint {file.name} in {run}, but the run has not saved one yet. Wait until it has."
        )
    weights = _weights_in(file) if checkpoint == "last" else read_torch(file)
    if any(".lora_" in name for name in weights):
        raise ValueError(
            f"Expected a run without adapters, but the weights in {file} are those of LoRA adapters, which are merged "
            "at the end. Finish the run to load its model."
        )
    model = _load_native(run / "model", (), family)
    model.load_state_dict(weights)
    model.history = read_history(run / "history.jsonl")
    model.path = None  # the folder holds other weights
    return model


def _weights_in(checkpoint: Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint of a run: a file, or a folder of shards."""
    if checkpoint.is_file():
        return read_torch(checkpoint)["model"]
    tensors = all_shards(checkpoint)
    return {name.removeprefix("model."): weight for name, weight in tensors.items() if name.startswith("model.")}


def _load_native(folder: Path, ignore: Iterable[str], family: str | None) -> CellModel:
    if not is_native(folder):
        readable = [name for name in families() if hasattr(family_module(name), "read")]
        raise ValueError(
            f"Expected a model that scllm wrote (config.json and weights.safetensors) in {folder}, but there is none. "
            f"For a published checkpoint, pass family=, one of {', '.join(map(repr, readable))}."
        )
    config, vocab, weights, arrays = read_native(folder)
    saved = config["family"]
    if family not in (None, saved):
        raise ValueError(f"{folder} holds a {saved!r} model, but family={family!r} was passed. Leave family= out.")
    if "." in saved and family is None:
        # a family outside this package is imported only when the caller passes it, never because a file says so
        raise ValueError(
            f"The model in {folder} is of the family {saved!r} from another package. If you trust that package, pass "
            f"family={saved!r}."
        )
    module = family_module(saved)
    unknown = sorted(set(config["config"]) - {field.name for field in fields(module.Config)})
    if unknown:
        raise ValueError(
            f"The model in {folder} has the setting {unknown[0]!r}, which {saved} lacks in this version of scllm. "
            "Load it with the version that wrote it, or train it again."
        )
    heads = tuple(HeadSpec.from_dict(spec) for spec in config["heads"])
    checkpoint = Checkpoint(
        module.Config(**config["config"]),
        Vocab.from_dict(vocab),
        encoder_from_dict(config["encoder"], arrays, family),
        weights,
        heads,
    )
    model = _filled(module, checkpoint, checkpoint.vocab, folder, ignore, config.get("weight_dtype", "float32"))
    model.comparison = read_report(folder / "report.json")
    model.trained_on = read_ledger(folder / LEDGER)
    model.known_cells = read_known_cells(folder / KNOWN_CELLS, heads)
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
    """Build the model and fill in the weights of a checkpoint, without changing the caller's random state."""
    with torch.random.fork_rng([]):
        model: CellModel = module.Model(checkpoint.config, vocab, checkpoint.encoder)
        model.set_heads(checkpoint.heads)
        prepare_int8(model, weight_dtype, checkpoint.weights)
    load_weights(model, checkpoint.weights, source=folder, ignore=ignore)
    return model.eval()
