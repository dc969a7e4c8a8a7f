"""Training settings: one frozen dataclass for functions, command line and run directories."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from scllm._typing import HeadSetting
from scllm.data.mixture import check_group_weights
from scllm.data.plan import n_batches

__all__ = ["Precision", "Settings", "TrainConfig"]

T = TypeVar("T")

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["step", "cosine", "linear", "constant"]
Strategy = Literal["ddp", "fsdp"]
Logger = Literal["tensorboard", "wandb"]
GeneInit = Literal["svd", "random"]
ViewDownsample = Literal["match", "none"]

# smallest value of each setting
_LEAST = {
    **dict.fromkeys(("batch_size", "epochs", "steps", "accumulate", "eval_every", "log_every", "keep_last"), 1),
    **dict.fromkeys(("patience", "max_tokens", "max_len", "n_shards", "shuffle_cells"), 1),
    **dict.fromkeys(("warmup", "weight_decay", "max_restarts", "random_state"), 0),
}
# settings above 0, and settings from 0 to below 1, each with advice
_POSITIVE = {
    "lr": "scGPT uses 1e-4.",
    "gamma": "Pass 1 to keep the learning rate constant.",
    "layer_decay": "Pass 1 to use the same learning rate in all blocks.",
    "clip": "Pass None for no limit.",
    "relational_weight": "Pass relational=False to leave the term out.",
}
_BELOW_ONE = {"label_smoothing": "A common value is 0.1.", "downsample": "Pass 0 to train on all counts."}
_SECONDS = {"s": 1, "min": 60, "h": 3600}
# what other libraries call a setting, if that is not close to its name here
_NAMES_ELSEWHERE = {
    "learning_rate": "lr",
    "seed": "random_state",
    "max_steps": "steps",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "gradient_accumulation_steps": "accumulate",
}


def _checks_names(cls: type[T]) -> type[T]:
    """Decorate a dataclass so that an unknown setting is a ``TypeError`` that offers the closest one."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def checked(self: T, *args: Any, **given: Any) -> None:
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(_not_a_setting(unknown[0], known))
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[method-assign]
    return cls


def _not_a_setting(name: str, known: Collection[str]) -> str:
    """Say that there is no such setting, and offer the closest one."""
    found = _NAMES_ELSEWHERE.get(name)
    close = [found] if found is not None else get_close_matches(name, known, n=1, cutoff=0.8)
    elsewhere = "Pass freeze, loss, dropout and others to the function itself."
    offer = f"Did you mean {close[0]!r}?" if close else elsewhere
    return f"Expected training settings out of {sorted(known)}, got {name!r}. {offer}"


@_checks_names
@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; ``None`` stands for the default of the function and the model family.

    Parameters
    ----------
    batch_size
        Number of cells per optimiser step, over all processes.
    lr
        Peak learning rate.
    epochs
        Number of passes over the training cells.
    steps
        Number of optimiser steps, instead of ``epochs``.
    warmup
        Number of steps over which the learning rate rises from zero. ``None``: 20 in fine-tuning, otherwise 0.
    schedule
        How the learning rate changes: ``"step"`` (multiplied by ``gamma`` after each epoch), ``"cosine"`` or
        ``"linear"`` (falls to zero at the end), or ``"constant"``. ``None``: step in pretraining, linear in
        fine-tuning.
    gamma
        Factor of the learning rate per epoch with ``schedule="step"``.
    weight_decay
        Weight decay of AdamW, for matrices other than embedding tables. Weights without a gradient (the blocks, if
        heads read only the inputs) shrink too, unless they are frozen.
    layer_decay
        Factor of the learning rate from each block to the block before it; with 1, the rate is the same in all blocks.
    clip
        Largest norm of the gradient; ``None`` for no limit.
    precision
        ``"fp32"``, ``"bf16"``, ``"fp16"`` (with loss scaling), or ``"auto"``.
    accumulate
        Number of micro-batches into which the cells of a step are split, to save memory (gradient accumulation).
    max_tokens
        Largest number of tokens in a micro-batch. Longer ones are cut, which does not change the result. ``None``: as
        many as fit into memory. On a GPU, that is tried out before the first step, with cells of the largest length.
    max_len
        Largest number of tokens per cell in training, ``<cls>`` included: of longer cells a random subset is read, new
        in each epoch, which saves time and regularises. Validation and embedding read as much as the encoder gives.
        ``None``: 512 in :func:`pretrain` and :func:`finetune` of models of size ``"tiny"`` and ``"small"`` (256 for
        new scgpt models with ``relational``), and no limit below the encoder's own in all others. A large number
        (``max_len=100_000``) reads whole cells there too.
    downsample
        Count downsampling (binomial thinning) of training cells as augmentation: the largest fraction of counts
        that is removed at random from a cell. ``None``: the default of the family (scfoundation: 0.8 in pretraining,
        all others 0).
    n_shards
        Number of shards into which the training cells of files are dealt, which is also the largest number of
        processes. The order of cells depends on it, but not on the number of processes. Data in memory have no shards.
    shuffle_cells
        Number of cells of files that all processes together hold in memory, to shuffle them. A larger number mixes
        cells that are further apart in a file, and takes memory. Data in memory are shuffled as a whole.
    group_weights
        Mixture weights: which groups of training cells, such as tissues or data sets, are drawn more or less often.
        ``key`` is the column of ``obs`` with the group of each cell. An epoch still draws as many cells as there are,
        some of them several times and others not at all.

        - ``{"key": "tissue", "temperature": 0.5}``: the probability of a group is proportional to its number of cells
          to the power of ``temperature``. With 1, all cells are equally likely, as without ``group_weights``. With 0,
          all groups are.
        - ``{"key": "tissue", "weights": {"blood": 2, "lung": 1}}``: the probability of a group is proportional to its
          weight, whatever its number of cells; here two thirds of the cells are blood. All groups must be named; those
          with weight 0 are left out.
    relational
        Whether :func:`pretrain` adds the relational term to the loss: the cosine similarities between the embeddings of
        the cells of a step are regressed on those between the first 50 principal components of their log-normalised
        profiles (relational knowledge distillation, Park et al. 2019). What is embedded is a view of each cell, see
        ``view_downsample``. This takes another forward and backward pass per step. ``None``: yes for new scgpt models
        of size ``"tiny"``, ``"small"`` and ``"base"``, which then also start ``<cls>`` from the mean of the cell's
        genes (``pooled_skip``), and for models that were pretrained with it; no for all others. ``False`` gives the
        objective of the original, with its learning rate, schedule, batch size and dropout.
    relational_weight
        Weight of the relational term, which is a mean over all pairs of cells of a step. ``None``: the default of the
        family, at which both terms are of similar size at the start.
    view_downsample
        ``"match"``: the counts of each view are downsampled (binomial thinning) towards the depth of a randomly drawn
        training cell, so that embeddings do not depend on the sequencing depth. ``"none"``: views have all counts. Data
        without counts have views at their full depth.
    gene_init
        Initial gene embedding table: ``"svd"`` (right singular vectors of the log-normalised training cells, which also
        replace a trained table) or ``"random"`` (the table of the model, unchanged). ``None``: ``"svd"`` if
        :func:`pretrain` makes the model from the name of a family.
    strategy
        ``"ddp"``: every process holds the whole model. ``"fsdp"``: weights, gradients and optimiser state are sharded
        over the processes, for models that do not fit on one GPU.
    max_restarts
        How often the processes of a run on this machine are started again after one of them has failed. They resume
        from the last checkpoint.
    logger
        Where losses are logged besides ``history.jsonl``: ``"tensorboard"`` or ``"wandb"``.
    random_state
        Seed for data order, masking, random subsets of genes and dropout.
    log_every
        Number of steps between two lines of the history.
    save_every
        Number of steps between two checkpoints, or time (``"30s"``, ``"10min"``, ``"2h"``). One is also saved after
        each validation, which is at the end of each epoch unless ``eval_every`` is set. ``None``: only these.
    keep_last
        Number of checkpoints to keep. If the newest cannot be read, a run resumes from the one before.
    timeout
        How long processes wait for each other (``"10min"``). If one is lost or hangs, the others end after this time.
    use_dropout
        Whether to use the model's dropout in training. ``None``: yes in pretraining and in :func:`finetune` of scbert,
        no in all other fine-tuning, where heads are initialised on embeddings without dropout.
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

        The figures are those of a tiny or small scgpt, pretrained with ``relational=False``, in ``docs/study.md``. To
        compare on your own data, run :func:`cross_validate` with each.
    label_smoothing
        Fraction of each target that is spread over all labels, in fine-tuning with ``loss="ce"``.
    patience
        Early stopping: number of validations without a better loss after which training stops; ``None``: never.
    eval_every
        Number of steps between two validations, for long epochs. At most 10,000 validation cells are used then, the
        same ones each time. ``None``: all of them, at the end of each epoch.
    compile
        Whether to compile the blocks with ``torch.compile``.
    checkpointing
        Whether to recompute blocks in the backward pass, to save memory.
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
    max_tokens: int | None = None
    max_len: int | None = None
    downsample: float | None = None
    n_shards: int = 64
    shuffle_cells: int = 1 << 16
    group_weights: Mapping[str, Any] | None = None
    relational: bool | None = None
    relational_weight: float | None = None
    view_downsample: ViewDownsample = "match"
    gene_init: GeneInit | None = None
    strategy: Strategy = "ddp"
    max_restarts: int = 0
    logger: Logger | None = None
    random_state: int | None = None
    log_every: int = 1
    save_every: int | str | None = "10min"
    keep_last: int = 2
    timeout: str = "10min"
    use_dropout: bool | None = None
    head_reads: HeadSetting | None = None
    label_smoothing: float = 0.0
    patience: int | None = None
    eval_every: int | None = None
    compile: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        n_steps, _ = self.save_interval()
        if n_steps is not None:
            object.__setattr__(self, "save_every", n_steps)  # a plain number
        self.timeout_seconds()
        if self.group_weights is not None:
            object.__setattr__(self, "group_weights", check_group_weights(self.group_weights))
        for name, hint in get_type_hints(type(self)).items():
            if name in ("save_every", "timeout", "group_weights"):
                continue  # checked above
            value, kinds = getattr(self, name), get_args(hint)
            if value is None and type(None) in kinds:
                continue
            # plain Python values, because they are written to run directories
            object.__setattr__(self, name, _plain(name, value, kinds[0] if type(None) in kinds else hint))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"Expected {name} of at least {least}, got {value}. Pass {least} or a larger number.")
        for name, advice in _POSITIVE.items():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Expected {name} to be a positive number, got {value}. {advice}")
        for name, advice in _BELOW_ONE.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"Expected {name} of at least 0 and below 1, got {value}. {advice}")

    def save_interval(self) -> tuple[int | None, float]:
        """Return ``save_every`` as a number of steps (``None`` if it is a time), and as seconds."""
        every = self.save_every
        if every is None:
            return None, math.inf
        if isinstance(every, Integral) and not isinstance(every, bool) and every > 0:
            return int(every), math.inf
        seconds = _seconds(every)
        if seconds is None:
            raise ValueError(
                "Expected save_every to be a number of steps of at least 1, or a time in s, min or h such as '10min', "
                f"got {every!r}. Pass None to save only after each validation."
            )
        return None, seconds

    def timeout_seconds(self) -> float:
        """Return ``timeout`` in seconds."""
        seconds = _seconds(self.timeout)
        if seconds is None:
            raise ValueError(
                f"Expected timeout to be a time in s, min or h, got {self.timeout!r}. Pass for example '10min'."
            )
        return seconds

    def merged(self, given: Mapping[str, Any]) -> TrainConfig:
        """Return a copy with the arguments of a function; a setting given in both places is a ``TypeError``."""
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if getattr(self, name) is not None:
                raise TypeError(
                    f"{name} was given twice: {value!r} as an argument and {getattr(self, name)!r} in config. "
                    "Give it only once."
                )
        return replace(self, **given)

    def resolved(self, defaults: Mapping[str, Any]) -> Settings:
        """Return the settings with defaults in place of ``None``."""
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return Settings(**{**vars(self), **missing})

    def to_dict(self) -> dict[str, Any]:
        """Return plain settings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Read plain settings, from JSON or TOML."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(saved) - known)
        if unknown:
            in_table = " Write settings above any [table]." if isinstance(saved[unknown[0]], Mapping) else ""
            raise ValueError(_not_a_setting(unknown[0], known) + in_table)
        return cls(**saved)


@dataclass(frozen=True, kw_only=True)
class Settings(TrainConfig):
    """Training settings with all defaults filled in, as a run directory holds them."""

    batch_size: int
    lr: float
    warmup: int
    schedule: Schedule
    precision: Precision
    downsample: float
    gene_init: GeneInit
    use_dropout: bool
    random_state: int
    relational: bool = False

    def steps_per_epoch(self, n_cells: int) -> int:
        """Count the optimiser steps of one epoch, the same on every rank."""
        return n_batches(n_cells, self.batch_size)

    def at_least(self, n_steps: int, n_cells: int) -> Self:
        """Return settings with enough whole epochs for at least ``n_steps`` steps."""
        least = -(-n_steps // max(self.steps_per_epoch(n_cells), 1))
        return self if self.epochs is None else replace(self, epochs=max(self.epochs, least))

    def n_steps(self, n_cells: int) -> int:
        """Count the optimiser steps of the whole training."""
        return self.steps or self.steps_per_epoch(n_cells) * (self.epochs or 1)


def _seconds(time: object) -> float | None:
    """Convert a time such as ``"10min"`` to seconds; ``None`` if it is not a time above zero."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h)", time) if isinstance(time, str) else None
    return None if found is None else float(found[1]) * _SECONDS[found[2]] or None


def _plain(name: str, value: Any, kind: Any) -> Any:
    """Convert a value to the type of a setting; raise an error if it has another type or is not an allowed string."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"Expected {name} to be one of {get_args(kind)}, got {value!r}. Pass one of them.")
        return value
    fits, expected = {
        # True counts as a number in Python, but is a mistake here
        int: (isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
        float: (isinstance(value, Real) and not isinstance(value, bool), "a number"),
        bool: (isinstance(value, bool), "True or False"),
    }[kind]
    if not fits:
        raise TypeError(f"Expected {name} to be {expected}, got {value!r}. Pass {name} as {expected}.")
    return kind(value)
