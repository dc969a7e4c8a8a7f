"""Train heads on genes in each fold, and compute the methods they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from scllm import models
from scllm._log import details
from scllm._results import MatchSettings, match_settings
from scllm._typing import FloatArray, IntArray
from scllm.data.fingerprint import fingerprint, hash_arrays, hash_match
from scllm.data.split import split_cells
from scllm.engine.config import Precision, Settings, TrainConfig
from scllm.engine.linear_head import chosen_penalty, fit_linear_head
from scllm.engine.lora import Lora, lora_settings
from scllm.engine.objectives import GeneLabel, LossName
from scllm.engine.optim import Freeze
from scllm.engine.spec import Cells
from scllm.models.base import Batch, CellModel, HeadSpec
from scllm.tl._folds import keep_predictions, kept_predictions
from scllm.tl._gene_states import GeneCells, gene_statistics, pooled
from scllm.tl._train import Processes, Training, merged_config, train

__all__ = ["GeneTask", "Options", "gene_config"]

_EPOCHS, _LR = 3, 1e-4  # the defaults of all families


@dataclass(frozen=True)
class Options:
    """Options of ``finetune`` that apply to genes."""

    class_weight: Literal["balanced"] | None = "balanced"
    validation: float = 0.0
    lora: Lora | None = None
    layer: str | None = None
    gene_key: str | None = None
    min_coverage: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    n_gpus: int | None = None
    n_procs: int | None = None
    device: str = "auto"
    run_dir: str | PathLike[str] | None = None
    precision: Precision = "auto"
    resume: Literal["auto"] | bool = "auto"
    config: TrainConfig | None = None
    random_state: int = 0


def gene_config(model: CellModel, options: Options) -> Settings:
    """Complete the training settings; raise for settings that heads on genes do not have."""
    defaults = {
        **models.family_module(model.family).FINETUNE,
        "epochs": _EPOCHS,
        "lr": _LR,
        "gene_init": "random",
        "use_dropout": False,  # heads are initialised on hidden states computed without dropout
        "schedule": "linear",
        "warmup": 20,
    }
    given = {"epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    config = merged_config(
        options.config, given, defaults, precision=options.precision, random_state=options.random_state
    )
    for name in ("head_reads", "label_smoothing", "group_weights"):
        value = getattr(options.config, name, None)
        if value:
            raise TypeError(
                f"Expected config without {name}, which applies only to heads on cells, got {name}={value!r}. Leave it "
                "out."
            )
    return config


@dataclass(frozen=True)
class GeneTask:
    """Labelled genes in their cells, and how a model is trained on them.

    Parameters
    ----------
    model
        The model that each fold starts from, in evaluation mode and on the CPU.
    cells
        The genes, and the cells over which their hidden states are averaged.
    codes, classes
        Index of each gene's label in ``classes``.
    loss
        Weight of each loss.
    freeze
        Weights that are not trained.
    options, config, where
        How the model is trained.
    run_dir
        Directory of the folds' runs; ``None`` with ``freeze="encoder"``, which has no runs.
    keep_models
        Whether to keep the weights of finished folds.
    key
        Name of the head.
    """

    model: CellModel
    cells: GeneCells
    codes: IntArray
    classes: tuple[str, ...]
    loss: Mapping[LossName, float]
    freeze: Freeze
    options: Options
    config: Settings
    where: Processes
    run_dir: Path | None
    keep_models: bool
    key: str

    @property
    def seed(self) -> int:
        """Random seed for cells, folds, heads and training."""
        return self.config.random_state

    @property
    def _matching(self) -> MatchSettings:
        return match_settings(self.cells.adata, self.options.gene_key, self.options.min_coverage)

    def by_model(self, fold: IntArray) -> FloatArray:
        """Compute out-of-fold probabilities with the model, ``(g, k)``."""
        states = self.states(self.model, _hidden)
        found = np.zeros((len(fold), len(self.classes)))
        for number in range(fold.max() + 1):
            training, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
            held_out = training[:0]
            if self.run_dir is not None:  # validation genes choose the best epoch
                training, held_out = self._split(training)
            head = self._fitted(states, training, self.loss)
            if self.run_dir is None:
                found[test] = self._probabilities(_applied(head, states[test]), self.loss)
                continue
            # the other folds would log the same as the first one
            with details() if number else nullcontext():
                found[test] = self._by_tuned(head, training, held_out, test, self.run_dir / f"fold-{number}")
        return found

    def _by_tuned(
        self, head: nn.Linear, training: IntArray, held_out: IntArray, test: IntArray, run_dir: Path
    ) -> FloatArray:
        """Return the probabilities of a model trained from this head, or those that an earlier call kept."""
        spec = self._spec(training, held_out, test)
        found = kept_predictions(run_dir, spec, keep_models=self.keep_models)
        if found is None:
            tuned = self._tuned(head, training, held_out, run_dir)
            with details():
                logits = self.states(tuned, lambda replica, batch: replica.gene_head_outputs(batch)[self.key])
            found = self._probabilities(logits[test], self.loss)
            keep_predictions(run_dir, spec, found, keep_models=self.keep_models)
        return found

    def _spec(self, training: IntArray, held_out: IntArray, test: IntArray) -> dict[str, Any]:
        """Return everything that a fold's predictions depend on."""
        lora = lora_settings(self.options.lora)
        genes = {"training": training, "validation": held_out, "test": test, "labels": self.codes}
        return {
            "weights": self.model.hash(),
            "train": {**self.config.to_dict(), "precision": None},
            "loss": dict(self.loss),
            "freeze": self.freeze,
            "lora": None if lora is None else asdict(lora),
            "class_weight": self.options.class_weight,
            "classes": self.classes,
            "data": {
                "fingerprint": fingerprint(self.cells.source),
                "layer": self.options.layer,
                "genes": hash_arrays(genes | {"tokens": self.cells.tokens}),
                "tokens": hash_match(self.cells.match),
                **self._matching,
            },
        }

    def by_baseline(self, fold: IntArray) -> FloatArray:
        """Compute out-of-fold probabilities with a logistic regression on statistics of the same cells, ``(g, k)``."""
        statistics = gene_statistics(self.cells, len(self.model.vocab), random_state=self.seed)
        found, loss = np.zeros((len(fold), len(self.classes))), {"bce": 1.0}
        for number in range(fold.max() + 1):
            head = self._fitted(statistics, np.flatnonzero(fold != number), loss)
            test = fold == number
            found[test] = self._probabilities(_applied(head, statistics[test]), loss)
        return found

    def by_majority(self, fold: IntArray) -> FloatArray:
        """Return the frequencies of the classes among the training genes, ``(g, k)``."""
        counts = np.stack([np.bincount(self.codes[fold != f], minlength=len(self.classes)) for f in np.unique(fold)])
        return (counts / counts.sum(1, keepdims=True))[fold]

    def states(self, model: CellModel, of: Any) -> FloatArray:
        """Average the result of ``of`` for each gene over its cells, ``(g, d)``."""
        return pooled(self.cells, model, of, device=self.options.device, precision=self.options.precision)

    def _split(self, training: IntArray) -> tuple[IntArray, IntArray]:
        """Split genes into those to train on and those that choose the best epoch."""
        share = self.options.validation
        if not share:
            return training, training[:0]
        share = min(max(share, 1 / len(training)), 1 - 1 / len(training))
        part = split_cells(
            len(training), (1 - share, share), stratify=pd.Series(self.codes[training]), random_state=self.seed
        )
        return training[part == 0], training[part == 1]

    def _class_weights(self, genes: IntArray) -> FloatArray:
        """Return the weight of each gene: equal weights, or equal total weights of the classes."""
        codes = self.codes[genes]
        if self.options.class_weight is None:
            return np.ones(len(genes))
        counts = np.bincount(codes, minlength=len(self.classes))
        return (len(genes) / (len(counts) * np.maximum(counts, 1)))[codes]

    def _fitted(self, states: FloatArray, genes: IntArray, loss: Mapping[LossName, float]) -> nn.Linear:
        """Fit the head with the lowest loss on fixed hidden states."""
        rows = states[genes], self.codes[genes], len(self.classes)
        weights = self._class_weights(genes)
        penalty = chosen_penalty(*rows, loss=loss, weights=weights, random_state=self.seed)
        return fit_linear_head(*rows, loss=loss, weights=weights, penalty=penalty)

    def _tuned(self, head: nn.Linear, training: IntArray, held_out: IntArray, run_dir: Path) -> CellModel:
        """Train the model on some genes, starting from the head fitted on its hidden states."""
        initial = copy.deepcopy(self.model)
        with torch.random.fork_rng([]):  # random weights of the new head are replaced on the next line
            initial.set_heads((HeadSpec(self.key, self.classes, level="gene"),))
        initial.heads[0].load_state_dict(head.state_dict())
        objective = GeneLabel(*self._labelled(training), *self._labelled(held_out), loss=self.loss)
        prepared = Training(
            "classify_genes",
            self.cells.adata,
            self.cells.source,
            self._matching,
            initial,
            objective,
            self.config,
            Cells(self._cells_with(training), self._cells_with(held_out)),
            self.where,
            params={"class_weight": self.options.class_weight, "validation": self.options.validation},
            freeze=self.freeze,
            lora=lora_settings(self.options.lora),
        )
        return train(prepared, run_dir=run_dir, resume="auto")

    def _labelled(self, genes: IntArray) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[float, ...], ...]]:
        """Return the tokens of each class and their weights, which do not depend on the number of cells of a gene."""
        n_tokens = self.cells.n_read[genes]
        weights = self._class_weights(genes) / n_tokens
        weights *= n_tokens.sum() / max((weights * n_tokens).sum(), 1e-12)
        of_class = [self.codes[genes] == code for code in range(len(self.classes))]
        return (
            tuple(tuple(self.cells.tokens[genes][at].tolist()) for at in of_class),
            tuple(tuple(weights[at].tolist()) for at in of_class),
        )

    def _cells_with(self, genes: IntArray) -> IntArray:
        """Return the cells that are used for at least one of the genes."""
        return np.flatnonzero(np.diff(self.cells.used[:, genes].indptr))

    def _probabilities(self, logits: FloatArray, loss: Mapping[LossName, float]) -> FloatArray:
        """Convert logits to the probability of each class; with ``"bce"``, each class against the rest, normalised."""
        logits = torch.from_numpy(logits)
        if set(loss) != {"bce"}:
            return logits.softmax(1).numpy()
        each = logits.sigmoid()
        return (each / each.sum(1, keepdim=True)).numpy()


def _hidden(replica: CellModel, batch: Batch) -> Tensor:
    return replica.hidden(batch)


def _applied(head: nn.Linear, states: FloatArray) -> FloatArray:
    with torch.no_grad():
        return head.double()(torch.from_numpy(states)).numpy()
