"""Training settings: one frozen dataclass, the same for verbs, command line and run directories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from scllm._typing import HeadSetting

__all__ = ["Precision", "TrainConfig"]

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["step", "cosine", "linear", "constant"]
Strategy = Literal["ddp", "fsdp"]
Logger = Literal["tensorboard", "wandb"]
GeneInit = Literal["svd", "random"]

# what is asked of each setting besides its type
_LEAST = {
    **dict.fromkeys(
        ("batch_size", "epochs", "steps", "accumulate", "log_every", "save_every", "patience", "max_len"), 1
    ),
    **dict.fromkeys(("warmup", "weight_decay", "max_restarts", "random_state"), 0),
}
_AT_LEAST = {1: "at least 1 expected. Pass a positive number", 0: "0 or more expected. Pass 0 or a positive number"}
_POSITIVE = {
    "lr": "scGPT uses 1e-4.",
    "gamma": "1 keeps the learning rate.",
    "layer_decay": "1 trains all blocks alike.",
    "clip": "None is for no limit.",
}
_SHARES = {"label_smoothing": "0.1 is usual.", "downsample": "0 leaves it off."}


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; ``None`` is the verb's and family's own choice.

    Parameters
    ----------
    batch_size
        Cells of one optimiser step, over all processes.
    lr
        Highest learning rate.
    epochs
        Passes over the training cells.
    steps
        Optimiser steps, in place of ``epochs``.
    warmup
        Steps over which the learning rate rises from zero. ``None``: 20 in fine-tuning, else none.
    schedule
        ``"step"`` (times ``gamma`` each epoch), ``"cosine"`` or ``"linear"`` (down to zero at the end), ``"constant"``.
        ``None``: step in pretraining, linear in fine-tuning.
    gamma
        Factor of the learning rate an epoch with ``schedule="step"``.
    weight_decay
        Of AdamW, on matrices other than tables of embeddings; those that the loss does not reach (blocks, where heads
        read the inputs) shrink too, unless frozen.
    layer_decay
        Factor of the learning rate from each block to the one before it; 1 trains all alike.
    clip
        Largest norm of the gradient; ``None`` for no limit.
    precision
        ``"fp32"``, ``"bf16"``, ``"fp16"`` (with loss scaling), or ``"auto"``.
    accumulate
        Parts in which a step's cells go through the model, one after the other, for less memory.
    max_len
        Longest sentence in training, ``<cls>`` included: a random part of longer cells is read, which saves time and
        regularises. The model itself keeps the encoder's own. ``None``: no shorter than that.
    downsample
        Largest share of counts taken away at random from each cell of a training batch (augmentation). ``None`` is the
        family's own (scfoundation: 0.8 in pretraining, all others 0).
    gene_init
        Where the gene table of a fresh model starts: ``"svd"`` (right singular vectors of the log-normalised
        training cells, in place of a trained table too) or ``"random"`` (as it is). ``None``: ``"svd"`` where
        :func:`pretrain` makes the model from a family's name.
    strategy
        ``"ddp"``: every process holds the whole model; ``"fsdp"``: weights, gradients and optimiser state are split
        over the processes, for models that do not fit on one GPU.
    max_restarts
        How often a failed group of processes is started again.
    logger
        Where losses are sent besides ``history.jsonl``: ``"tensorboard"`` or ``"wandb"``.
    random_state
        What order, masks, crops and dropout are a function of.
    log_every
        Steps between two lines of the history.
    save_every
        Steps between two checkpoints; ``None``: one an epoch.
    use_dropout
        Whether the model's dropout is on in training. ``None``: yes in pretraining and in :func:`finetune` of scbert;
        in all other fine-tuning heads start from states without that noise, and it stays off.
    head_reads
        What the heads of :func:`finetune` read of a cell. ``None`` is ``"both"``, and ``"published"`` for scbert and
        scfoundation, which have no other heads; no other argument changes it.

        - ``"both"``: the embeddings before the first block and after the last one. Choose it for more cells of the
          donors and studies that were trained on, and for a new condition of the same types (stimulated cells: accuracy
          0.891 against 0.863 with ``"inputs"``).
        - ``"inputs"``: only the embeddings before the first block, which do not depend on the other genes of the cell.
          The blocks are then not trained: embed cells with the model that was given. Choose it for new donors and
          studies (pancreas, held-out donors: 0.996 against 0.956 with ``"both"``; held-out studies: 0.993 against
          0.932).
        - ``"last"``: only the embeddings after the last block.
        - ``"published"``: the head of the family's published checkpoints and what it reads (scgpt: two hidden layers on
          ``<cls>``; geneformer: a linear layer on the first token; gene language models: one on the mean). Only models
          with it can be saved in a published format.

        The figures are those of a tiny or small scgpt in ``docs/study.md``. To compare on your own data, run
        :func:`cross_validate` with each.
    label_smoothing
        Share of each label's target that is spread over all labels, in fine-tuning with ``loss="ce"``.
    patience
        Epochs without a better validation loss after which training stops; ``None``: never.
    compile
        Whether blocks go through ``torch.compile``.
    checkpointing
        Whether blocks are computed again in the backward pass, for less memory.
    """

    batch_size: int | None = None
    lr: float | None = None
    epochs: int | None = None
    steps: int | None = None
    warmup: int | None = None
    schedule: Schedule | None = None
    gamma: float = 0.9
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    clip: float | None = 1.0
    precision: Precision | None = None
    accumulate: int = 1
    max_len: int | None = None
    downsample: float | None = None
    gene_init: GeneInit | None = None
    strategy: Strategy = "ddp"
    max_restarts: int = 0
    logger: Logger | None = None
    random_state: int | None = None
    log_every: int = 1
    save_every: int | None = None
    use_dropout: bool | None = None
    head_reads: HeadSetting | None = None
    label_smoothing: float = 0.0
    patience: int | None = None
    compile: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint)
            if value is None and type(None) in kinds:
                continue
            # plain ones, as they are written into run directories
            object.__setattr__(self, name, _plain(name, value, kinds[0] if type(None) in kinds else hint))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value}, {_AT_LEAST[least]}.")
        for name, advice in _POSITIVE.items():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, a positive number expected. {advice}")
        for name, advice in _SHARES.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, a share from 0 up to below 1 expected. {advice}")

    def merged(self, given: Mapping[str, Any]) -> TrainConfig:
        """With what the caller of a verb gave besides; a value given both ways is a ``TypeError``."""
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if getattr(self, name) is not None:
                raise TypeError(
                    f"{name} is given twice: {value!r} as an argument, {getattr(self, name)!r} in config. Give it once."
                )
        return replace(self, **given)

    def resolved(self, defaults: Mapping[str, Any]) -> TrainConfig:
        """With defaults in place of what was left open."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def to_dict(self) -> dict[str, Any]:
        """Plain settings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TrainConfig:
        """Read plain settings, from JSON or TOML."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(saved) - known)
        if unknown:
            close = get_close_matches(unknown[0], known, n=1, cutoff=0.8)
            offer = (
                f"Did you mean {close[0]!r}?" if close else
                "What else a verb takes (freeze, loss, dropout) is given to the verb, and settings stand in no [table]."
            )  # fmt: skip
            raise ValueError(f"{unknown[0]!r} is not a training setting, one of {sorted(known)} expected. {offer}")
        return cls(**saved)


def _plain(name: str, value: Any, kind: Any) -> Any:
    """The value as what a setting is; an error where it is of another type, or none of the strings it may be."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} is {value!r}, one of {get_args(kind)} expected. Pass one of those.")
        return value
    fits, expected = {
        # True is a number to Python, and a slip here
        int: (isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
        float: (isinstance(value, Real) and not isinstance(value, bool), "a number"),
        bool: (isinstance(value, bool), "True or False"),
    }[kind]
    if not fits:
        raise TypeError(f"{name} is {value!r}, {expected} expected. Pass {name}= as {expected}.")
    return kind(value)
