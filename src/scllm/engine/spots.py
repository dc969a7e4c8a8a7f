"""Training of the spatial family: image features in, expression of all genes out.

The token loop (``engine/loop.py``) packs token sequences and spreads them over processes. Here a batch is a few dense
rows, and a run takes seconds to minutes, so this is a loop of its own that writes the same run directory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scllm._log import log, progress
from scllm._typing import CSR, FloatArray, IntArray
from scllm.data.patches import PatchReader
from scllm.data.run_files import append_history, cut_history, read_history
from scllm.data.targets import dense
from scllm.engine.checkpoint import restore, save
from scllm.engine.config import Settings
from scllm.engine.run import Run
from scllm.models.image_encoders import normalised, stain_augmented
from scllm.models.spatial import Model
from scllm.models.storage import read_torch

__all__ = ["Spots", "Term", "fit_spots", "spot_features"]

_SECONDS = 10.0  # between two checkpoints
_EVERY = 50  # steps between two estimates of the gradients' norms
_TAUS = (1.0, 0.1)  # temperature of the relaxed order at the beginning and at the end


@dataclass(frozen=True)
class Spots:
    """What is known of the spots of a data set.

    Parameters
    ----------
    features
        Image features, ``(n, d)`` float32; ``None`` if the model reads pixels.
    reader
        Reads the pixels of patches, if the model reads them.
    neighbours
        Nearest spots of each spot, ``(n, k)``.
    target
        Log-normalised expression, spots by all genes.
    counts
        Counts in the same layout, for a likelihood of counts.
    columns
        Column of each predicted gene.
    """

    features: FloatArray | None
    reader: PatchReader | None
    neighbours: IntArray
    target: CSR
    counts: CSR | None
    columns: IntArray

    def truth(self, rows: IntArray) -> Tensor:
        """Return log-normalised expression of the predicted genes, ``(b, g)``."""
        return torch.from_numpy(dense(self.target[rows], self.columns))

    def count_truth(self, rows: IntArray) -> tuple[Tensor, Tensor]:
        """Return counts of the predicted genes ``(b, g)`` and totals over all genes ``(b,)``."""
        assert self.counts is not None
        counts = self.counts[rows]
        total = torch.from_numpy(np.asarray(counts.sum(axis=1), np.float32).ravel())
        return torch.from_numpy(dense(counts, self.columns)), total


@dataclass
class Term:
    """A loss term beside that of the prediction, scaled by the ratio of the two gradients at the prediction.

    Parameters
    ----------
    module
        Maps prediction and truth to a loss per spot.
    weight
        Wanted ratio of the norms of the gradients of the term and of the prediction's loss.
    factor
        What the term is multiplied by; found anew every 50 steps.
    """

    module: nn.Module
    weight: float
    factor: float = 0.0

    def scale(self, main: Tensor, term: Tensor, predicted: Tensor) -> None:
        """Choose the factor from the gradients at the prediction."""
        of_main, of_term = (torch.autograd.grad(loss, predicted, retain_graph=True)[0].norm() for loss in (main, term))
        ratio = float(of_main / of_term) if of_term > 0 else 0.0
        self.factor = self.weight * ratio if math.isfinite(ratio) else 0.0


def fit_spots(run: Run, model: Model, spots: Spots, config: Settings, term: Term | None, device: torch.device) -> None:
    """Train the model of a run to the end, going on from its last checkpoint; the best weights are kept in the model.

    Weights are compared by the prediction's loss on the validation spots, without the other term. Without validation
    spots the last weights are kept.
    """
    cells = run.cells
    model.to(device)
    if term is not None:
        term.module.to(device)
    groups = [
        {
            "params": [w for w in model.parameters() if (w.ndim > 1) == decays],
            "weight_decay": config.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    n_epochs = config.epochs or -(-(config.steps or 1) // config.steps_per_epoch(len(cells.train)))
    state = _resumed(run, model, optimizer, term)
    best, saved = restore(run.best), time.monotonic()
    for epoch in progress(range(state["epoch"], n_epochs), desc="training", total=n_epochs - state["epoch"]):
        began = time.perf_counter()
        lines = _train_epoch(model, spots, cells.train, config, term, optimizer, epoch, n_epochs, state)
        line = {"step": state["step"], "epoch": epoch, "split": "validation"}
        if len(cells.validation):
            loss = _validation_loss(model, spots, cells.validation, device)
            lines.append({**line, "loss": loss, model.config.likelihood: loss})
        else:
            loss = -float(epoch)  # the last weights
        for one in lines:
            if one["split"] == "train":
                one["cells_per_s"] = len(cells.train) / (time.perf_counter() - began)
        if loss < state["best"]:
            state["best"], state["since"] = loss, 0
            best = {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}
        else:
            state["since"] += 1
        state["epoch"] = epoch + 1
        append_history(run.history, lines)
        is_last = epoch == n_epochs - 1 or (config.patience is not None and state["since"] >= config.patience)
        assert best is not None
        if is_last or time.monotonic() - saved > _SECONDS:
            save(run.best, best)
            _checkpoint(run, model, optimizer, term, state)
            saved = time.monotonic()
        if is_last:
            break
    assert best is not None
    model.load_state_dict(best)
    model.cpu().eval()


def _train_epoch(
    model: Model, spots: Spots, rows: IntArray, config: Settings, term: Term | None, optimizer: torch.optim.Optimizer,
    epoch: int, n_epochs: int, state: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Pass once over the training spots; return the lines of the history."""
    n_steps = n_epochs * config.steps_per_epoch(len(rows))
    lines = []
    model.train()
    for batch in _batches(rows, config, epoch):
        step = state["step"]
        rate = _learning_rate(step, n_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        device = model.out.weight.device
        with torch.random.fork_rng([]):
            # dropout depends on the seed and the step alone
            torch.default_generator.manual_seed(_mixed(config.random_state, step))
            loss, line = _losses(model, spots, batch, term, step, step / max(1, n_steps - 1), device, config)
        optimizer.zero_grad()
        loss.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        state["step"] = step + 1
        lines.append({"step": step + 1, "epoch": epoch, "split": "train", **line, "lr": rate})
    if not all(math.isfinite(line["loss"]) for line in lines):
        raise RuntimeError(f"The loss became NaN in epoch {epoch}. Train again with a lower lr.")
    return lines


def _losses(
    model: Model, spots: Spots, rows: IntArray, term: Term | None, step: int, progress_made: float,
    device: torch.device, config: Settings,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    features, context = spot_features(model, spots, rows, device, augment=_mixed(config.random_state, step))
    predicted = model.expression(features, context)
    truth = spots.truth(rows).to(device)
    main = _prediction_loss(model, predicted, truth, spots, rows).mean()
    line = {"loss": main.item(), model.config.likelihood: main.item()}
    if term is None:
        return main, line
    if hasattr(term.module, "tau"):
        term.module.tau = _TAUS[0] * (_TAUS[1] / _TAUS[0]) ** progress_made
        term.module.n_calls = step  # what is hidden depends on the step alone
        term.module.train()
    extra = term.module(predicted, truth).mean()
    if step % _EVERY == 0:
        term.scale(main, extra, predicted)
    total = main + term.factor * extra
    return total, {**line, "loss": total.item(), "plausibility": extra.item(), "plausibility_factor": term.factor}


def _prediction_loss(model: Model, predicted: Tensor, truth: Tensor, spots: Spots, rows: IntArray) -> Tensor:
    if model.log_theta is None:
        return model.prediction_loss(predicted, truth, None)
    counts, total = (part.to(predicted.device) for part in spots.count_truth(rows))
    return model.prediction_loss(predicted, counts, total)


@torch.no_grad()
def _validation_loss(model: Model, spots: Spots, rows: IntArray, device: torch.device) -> float:
    model.eval()
    total = 0.0
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        predicted = model.expression(*spot_features(model, spots, part, device))
        total += _prediction_loss(model, predicted, spots.truth(part).to(device), spots, part).sum().item()
    return total / len(rows)


def spot_features(
    model: Model, spots: Spots, rows: IntArray, device: torch.device, *, augment: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the features of spots and the mean features of their neighbours, ``(b, d)`` each.

    A model that reads pixels encodes the patches of both, in training with random stains and turns.
    """
    k = model.config.n_neighbors
    near = spots.neighbours[rows]
    if model.image_encoder is None:
        assert spots.features is not None
        own = torch.from_numpy(spots.features[rows]).to(device)
        return own, torch.from_numpy(spots.features[near].mean(axis=1)).to(device) if k else None
    assert spots.reader is not None
    asked, place = np.unique(np.concatenate([rows, near.ravel()]) if k else rows, return_inverse=True)
    patches = torch.from_numpy(spots.reader.read(asked))
    if augment is not None:
        patches = stain_augmented(patches, torch.Generator().manual_seed(augment))
    found = model.image_encoder(normalised(patches.to(device)))[torch.from_numpy(place).to(device)]
    n = len(rows)
    return found[:n], found[n:].view(n, -1, found.shape[1]).mean(1) if k else None


def _batches(rows: IntArray, config: Settings, epoch: int) -> Iterator[IntArray]:
    """Yield the training spots of each step in an order that depends on the seed and the epoch."""
    order = np.random.default_rng((config.random_state, epoch)).permutation(rows)
    yield from np.array_split(order, config.steps_per_epoch(len(rows)))


def _learning_rate(step: int, n_steps: int, config: Settings) -> float:
    """Rise over the warm-up, then fall to zero as a cosine or linearly, or stay."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    after = min(1.0, max(0, step - config.warmup) / max(1, n_steps - config.warmup))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * after)), "linear": 1 - after}.get(config.schedule, 1.0)
    return config.lr * rise * fall


def _mixed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


def _checkpoint(
    run: Run, model: Model, optimizer: torch.optim.Optimizer, term: Term | None, state: dict[str, Any]
) -> None:
    weights = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    factor = 0.0 if term is None else term.factor
    save(run.last, {"model": weights, "optimizer": optimizer.state_dict(), "factor": factor, **state})


def _resumed(run: Run, model: Model, optimizer: torch.optim.Optimizer, term: Term | None) -> dict[str, Any]:
    """Return where the run stands, after restoring its last checkpoint if there is one."""
    if not run.last.exists():
        return {"epoch": 0, "step": 0, "best": math.inf, "since": 0}
    content = read_torch(run.last)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    if term is not None:
        term.factor = content["factor"]
    cut_history(run.history, content["step"])
    assert read_history(run.history) is not None
    log.info("resuming the run in %s after epoch %d", run.path, content["epoch"] - 1)
    return {name: content[name] for name in ("epoch", "step", "best", "since")}
