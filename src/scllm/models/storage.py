"""Write and read a model folder: ``config.json``, ``vocab.json``, ``weights.safetensors``.

``extras.npz`` holds the arrays of encoders that have any, and ``known_cells.npz`` what is kept of training cells. A
folder is written completely or not at all.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scllm._names import listed
from scllm.data.encode import encoder_to_dict
from scllm.data.run_files import append_history, write_json, write_report
from scllm.data.vocab import Vocab
from scllm.models.known_cells import known_arrays

if TYPE_CHECKING:
    from scllm.models.base import CellModel

__all__ = [
    "gene_list",
    "HUB",
    "KNOWN_CELLS",
    "LEDGER",
    "bytes_on_disk",
    "from_hub",
    "is_native",
    "load_weights",
    "plain_weights",
    "read_json",
    "read_native",
    "read_torch",
    "renamed",
    "require",
    "write_native",
]

HUB = "hf://"
_FORMAT = 1
_ARRAYS, KNOWN_CELLS = "extras.npz", "known_cells.npz"
_REPORT, LEDGER = "report.json", "trained_on.json"
_FILES = ("config.json", "vocab.json", "weights.safetensors", "history.jsonl", _REPORT, LEDGER, _ARRAYS, KNOWN_CELLS)


def write_native(model: CellModel, path: Path) -> None:
    """Write a model folder next to the target and rename it, so that the target is never incomplete.

    A model that is replaced is first moved aside. If the process is killed between the two renames, the path is empty,
    and both models are complete in hidden folders next to it whose names begin with that of the model.
    """
    path = path.absolute()
    _check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        config = {
            "format": _FORMAT,
            "family": model.family,
            "config": asdict(model.config),
            "encoder": encoder_to_dict(model.encoder),
            "heads": [asdict(spec) for spec in model.head_specs],
            "weight_dtype": model.weight_dtype,
        }
        (fresh / "config.json").write_text(json.dumps(config, indent=1))
        (fresh / "vocab.json").write_text(json.dumps(model.vocab.to_dict()))
        if model.encoder.arrays:
            np.savez(fresh / _ARRAYS, allow_pickle=False, **model.encoder.arrays)
        if model.known_cells:
            np.savez(fresh / KNOWN_CELLS, allow_pickle=False, **known_arrays(model.head_specs, model.known_cells))
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, fresh / "weights.safetensors")
        if model.history is not None:
            # missing entries of a line are NaN in the table
            lines = [{k: v for k, v in line.items() if v == v} for line in model.history.to_dict("records")]
            append_history(fresh / "history.jsonl", lines)
        if model.comparison is not None:
            write_report(fresh / _REPORT, model.comparison)
        if model.trained_on is not None:
            write_json(fresh / LEDGER, model.trained_on.to_dict("records"))
        for file in fresh.iterdir():
            _flush(file)
        fresh.chmod(0o755)
        _swap(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def bytes_on_disk(model: CellModel) -> int:
    """Measure the size of a saved model by writing it into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_native(model, Path(folder) / "model")
        return sum(file.stat().st_size for file in (Path(folder) / "model").iterdir())


def check_empty(path: Path) -> None:
    """Raise if writing a published format would overwrite other files."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ValueError(f"Expected a new or empty folder, but {path} already exists. Pass another path.")


def _check_target(path: Path) -> None:
    """Raise if writing a model would replace anything but a model."""
    if not path.exists():
        return
    others = sorted(file.name for file in path.iterdir() if file.name not in _FILES) if path.is_dir() else [path.name]
    if others:
        raise ValueError(
            f"Expected a new folder or a model that scllm wrote, but {path} holds other files (first: {others[0]!r}), "
            "which would be deleted. Pass another path."
        )


def from_hub(name: str) -> Path:
    """Download weights and dictionaries, never code, from the Hugging Face Hub (``hf://owner/name``)."""
    from huggingface_hub import snapshot_download  # only when the user names the Hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.json.gz", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.txt"]
    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"Could not download {name} from the Hugging Face Hub ({str(error).splitlines()[0]}). Check the name and "
            "the connection, or pass a local folder."
        ) from error


def is_native(path: Path) -> bool:
    """Return whether a folder holds a model that scllm wrote."""
    config = path / "config.json"
    return config.is_file() and (path / "weights.safetensors").is_file() and '"family"' in config.read_text()[:4096]


def read_native(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor], dict[str, NDArray[Any]]]:
    """Read ``config.json``, ``vocab.json``, the weights and the arrays of the encoder."""
    config = read_json(path / "config.json")
    if config.get("format") != _FORMAT:
        raise ValueError(
            f"Expected a model in format {_FORMAT}, but {path} has format {config.get('format')!r}. Update scllm."
        )
    try:
        weights = load_file(path / "weights.safetensors")
    except SafetensorError as error:
        raise ValueError(
            f"Expected a complete safetensors file, but {path / 'weights.safetensors'} cannot be read ({error}). It is "
            "truncated or damaged: copy it again, or use an earlier checkpoint."
        ) from error
    arrays = {}
    if (path / _ARRAYS).is_file():
        with np.load(path / _ARRAYS, allow_pickle=False) as stored:
            arrays = dict(stored)
    return config, read_json(path / "vocab.json"), weights, arrays


def read_json(file: Path) -> dict[str, Any]:
    """Read a file of settings; an error that names the file if it holds anything else."""
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(
            f"Expected a complete JSON file, but {file} cannot be read ({error}). It is truncated or damaged: copy it "
            "again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected a dictionary of settings in {file}, got a {type(content).__name__}. It is not the file that was "
            "published: copy it again."
        )
    return content


def require(
    settings: Mapping[str, Any],
    kinds: Mapping[str, type],
    source: object,
    *,
    others: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raise unless a checkpoint has these settings, and of these types; the error says what is there instead.

    ``others`` gives the names that other tools use for a setting.
    """
    missing = [name for name in kinds if name not in settings]
    if missing:
        pairs = [(name, other) for name in missing for other in (others or {}).get(name, ()) if other in settings]
        ways = "; ".join(f"{name!r} may be {other!r} ({settings[other]!r})" for name, other in pairs)
        advice = f"Here {ways}: rename it." if pairs else "Copy the file of the release again, or add them."
        raise ValueError(
            f"Expected the settings {', '.join(map(repr, kinds))} in {source}, but {', '.join(map(repr, missing))} "
            f"{'is' if len(missing) == 1 else 'are'} missing. There is {listed(list(map(str, settings)))}. {advice}"
        )
    for name, kind in kinds.items():
        if not isinstance(settings[name], kind) or isinstance(settings[name], bool):
            wanted = {int: "a whole number", dict: "a dictionary", str: "a string"}.get(kind, "a number")
            raise ValueError(f"Expected {name!r} in {source} to be {wanted}, got {settings[name]!r:.60}. Correct it.")


def read_torch(path: Path) -> dict[str, Any]:
    """Read plain tensors and containers from a file of ``torch.save``, without executing anything in it."""
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint file at {path}, but it does not exist. Check the path.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Expected a complete file of plain tensors, but {path} cannot be read ({reason}). It is truncated, "
            "damaged or contains code, which scllm never executes: copy it again, or use another checkpoint."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected a dictionary of weights in {path}, got a {type(content).__name__}. Use another checkpoint."
        )
    return content


# what training scripts put around the weights, and what wrappers put before their names
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def plain_weights(content: Mapping[str, Any], source: object) -> dict[str, Tensor]:
    """Weights by their own names, without what a training script, ``DataParallel`` or ``torch.compile`` adds."""
    for name in _WRAPPERS:
        if isinstance(content.get(name), Mapping):
            return plain_weights(content[name], source)
    odd = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(
            f"Expected a dictionary of weights in {source}, but {odd!r} is a {type(content[odd]).__name__}. There is "
            f"{listed(list(map(str, content)))}. Save the model's state_dict() alone."
        )
    return {_unwrapped(str(name)): tensor for name, tensor in content.items()}


def _unwrapped(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")  # a part of the model that was compiled by itself


def gene_list(file: Path, vocab: Vocab | None, n_genes: int, names: Sequence[str]) -> tuple[str, ...]:
    """Return the genes of a checkpoint without gene names, from ``vocab`` or from a file next to it."""
    lists = [file.parent / name for name in names if (file.parent / name).is_file()]
    if vocab is None and not lists:
        raise ValueError(
            f"{file} does not contain gene names. Pass the list of its {n_genes} genes in order with vocab=, or put it "
            f"next to the file as {names[0]}."
        )
    genes = (vocab or Vocab.read(lists[0])).genes
    if len(genes) != n_genes:
        raise ValueError(
            f"Expected a list of {n_genes} genes, as many as the model in {file} has, got {len(genes)}. Pass the list "
            "that the model was trained with as vocab=."
        )
    return genes


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    """Rename a weight by the first entry ``(old, new)`` whose old prefix matches; ``#`` matches a layer's number."""
    for old, new in table:
        found = re.match(re.escape(old).replace(r"\#", r"(\d+)"), name)
        if found:
            layer = found.group(1) if found.groups() else ""
            return new.replace("#", layer) + name[found.end() :]
    return name


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: object, ignore: Iterable[str] = ()
) -> None:
    """Load weights; names that are missing, unused or of the wrong shape raise an error that lists them."""
    expected = model.state_dict()
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    given = (
        {name: tensor for name, tensor in weights.items() if not name.startswith(ignore)} if ignore else dict(weights)
    )
    missing = sorted(name for name in set(expected) - set(given) if not (ignore and name.startswith(ignore)))
    surplus = sorted(set(given) - set(expected))
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(set(given) & set(expected))
        if given[name].shape != expected[name].shape
    ]
    problems = [("missing", missing), ("unused", surplus), ("wrong shape", shapes)]
    seen = "; ".join(f"{what}: {listed(names, quoted=False)}" for what, names in problems if names)
    if seen:
        raise ValueError(
            f"The weights in {source} do not match the model ({seen}). Check that the architecture is the one that was "
            "trained, or pass prefixes of weights to leave out with ignore=."
        )
    model.load_state_dict(given, strict=not ignore)


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _swap(fresh: Path, path: Path) -> None:
    """Replace a folder by a finished one with two renames, so that files of the two are never mixed."""
    if not path.exists():
        fresh.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
    path.rename(old)
    try:
        fresh.rename(path)
    except BaseException:
        old.rename(path)
        old.parent.rmdir()
        raise
    shutil.rmtree(old.parent, ignore_errors=True)
