"""The training loop, used for pretraining and fine-tuning."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from tqdm.auto import tqdm

from scllm._log import log, show_progress
from scllm.data.run_files import append_history, cut_history
from scllm.engine import ranks, sharding
from scllm.engine.checkpoint import Checkpoints, save, writing
from scllm.engine.config import Settings
from scllm.engine.device import autocast
from scllm.engine.estimate import matrix_rate
from scllm.engine.loader import Loader
from scllm.engine.mean_prediction import mean_prediction
from scllm.engine.memory import TokenLimit
from scllm.engine.objectives import Objective
from scllm.engine.optim import learning_rate, train_mode
from scllm.engine.relational import relational_loss
from scllm.engine.run import Run
from scllm.engine.saving import Saving
from scllm.engine.totals import Sums, Totals
from scllm.engine.updates import Updates
from scllm.models.base import CellModel

__all__ = ["fit"]


def fit(
    model: CellModel,
    batches: Loader,
    objective: Objective,
    config: Settings,
    *,
    run: Run,
    validation: Loader | None = None,
    from_start: bool = False,
    precision: str = "fp32",
    track: Callable[[dict[str, Any]], None] = lambda line: None,
) -> None:
    """Train a model in place, from the last checkpoint of the run directory to the end.

    Parameters
    ----------
    model
        The model on its device. Frozen weights have ``requires_grad=False``.
    batches
        Training cells.
    objective
        Training objective.
    config
        Training settings with all defaults filled in.
    run
        Run directory, which receives ``history.jsonl``, ``last.pt`` and ``best_model.pt``.
    validation
        Validation cells, which decide which weights are best; without them, the last weights are used.
    from_start
        Whether the initial weights can be the best (a model to fine-tune). They are then validated as step 0.
    precision
        ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    track
        Function that is called with each line of the history, on the first rank.
    """
    rank, world, per_epoch = ranks.rank(), ranks.world(), batches.n_batches()
    n_steps = config.n_steps(len(batches.rows))
    n_epochs = -(-n_steps // per_epoch)
    limit = TokenLimit(run.max_tokens, config.max_tokens)
    largest = batches.largest(world) if model.device.type == "cuda" else None
    updates = Updates(model, objective, config, precision, limit, largest)
    checkpoints = Checkpoints(run.checkpoints, run.last, config.keep_last)
    step, standing = _resume(run, updates, checkpoints)
    saved = step
    if from_start and validation is not None and step == 0:
        standing.best = _judge_start(model, validation, objective, precision, run, track)
    baseline = mean_prediction(model, objective, batches, validation, config.relational_weight) if rank == 0 else {}
    quiet, saving = not show_progress(), Saving(config)
    bar = tqdm(total=n_steps, initial=step, desc="training", unit="step", disable=quiet, leave=False)
    with bar, saving.listening():
        while step < n_steps and not standing.is_over(config.patience):
            epoch = step // per_epoch
            train_mode(model)
            read = batches.epoch(epoch, start=step % per_epoch, rank=rank, world=world, parts=config.accumulate)
            with closing(read):
                began = time.perf_counter()
                for parts in islice(read, n_steps - step):
                    waited = time.perf_counter() - began
                    lr = learning_rate(step, epoch, n_steps, config)
                    totals, norm = updates.update(parts, step, lr, saved, asked=saving.is_asked)
                    step += 1
                    speed = _speed(totals, time.perf_counter() - began, waited, updates)
                    means = totals.means
                    report = objective.report(dict(means), step - 1)
                    line: dict[str, Any] = {"step": step, "epoch": epoch, "split": "train", **report, "lr": lr}
                    lines = []
                    is_skipped = updates.skipped_in_a_row > 0
                    if step % config.log_every == 0 and not is_skipped:
                        lines.append(line | {"grad_norm": float(f"{norm:.6g}"), **speed})
                    is_judged = step == n_steps or step % (config.eval_every or per_epoch) == 0
                    if is_judged:
                        validated, score = "", -step  # without validation cells, the last weights count as the best
                        if validation is not None:
                            found = evaluate(model, validation, objective, precision, config.relational_weight)
                            if config.eval_every is not None:
                                train_mode(model)
                            score = found["loss"]
                            _check_validation(score, step, saved)
                            lines.append({"step": step, "epoch": epoch, "split": "validation", **found, "lr": lr})
                            validated = f", {score:.4g} on validation"
                        standing.judge(score)
                        # a progress bar shows the same
                        say = log.info if quiet else log.debug
                        text = "epoch %d of %d, step %d of %d: loss %.4g%s"
                        say(text, epoch + 1, n_epochs, step, n_steps, means["loss"], validated)
                    if rank == 0:
                        _log_lines(run, [one | baseline for one in lines], track)
                    if is_judged or totals.asked or (saving.is_due(step) and not is_skipped):
                        if is_judged and standing.since_best == 0:
                            _save_best(run, model)
                        updates.save(checkpoints, step, asdict(standing))
                        saved = step
                        saving.saved()
                    if standing.is_over(config.patience):
                        break
                    bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
                    bar.update()
                    began = time.perf_counter()


@dataclass
class _Standing:
    """The best validation loss so far, and the number of validations since then."""

    best: float = math.inf
    since_best: int = 0

    def judge(self, score: float) -> None:
        """Take note of a validation."""
        self.best, self.since_best = (score, 0) if score < self.best else (self.best, self.since_best + 1)

    def is_over(self, patience: int | None) -> bool:
        """Return whether to stop early."""
        return patience is not None and self.since_best >= patience


def _resume(run: Run, updates: Updates, checkpoints: Checkpoints) -> tuple[int, _Standing]:
    """Load the last checkpoint; return its step and standing."""
    state = updates.restore(checkpoints)
    step = 0 if state is None else state["step"]
    # otherwise ranks whose directories differ would train a mixture, or wait for each other for ever
    values = {"step": step, "specification of the run": json.dumps(run.spec.to_json(), sort_keys=True)}
    ranks.check_same(values if updates.in_shards else {**values, "weights": updates.model.hash()})
    if ranks.rank() == 0:
        cut_history(run.history, -1 if state is None else step)
    if state is None:
        return 0, _Standing()
    log.info("resuming at step %d", step)
    if state["precision"] != updates.precision:
        log.info("continuing in %s, after training in %s so far", updates.precision, state["precision"])
    return step, _Standing(state["best"], state["since_best"])


def _save_best(run: Run, model: CellModel) -> None:
    """Write the weights as those with the best validation loss; all ranks must call this."""
    weights = sharding.weights(model)
    if ranks.rank() == 0:
        save(run.best, weights)


def _log_lines(run: Run, lines: list[dict[str, Any]], track: Callable[[dict[str, Any]], None]) -> None:
    with writing(run.history):
        append_history(run.history, lines)
    for line in lines:
        track(line)


def _check_validation(loss: float, step: int, saved: int) -> None:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"The validation loss is {loss} at step {step}; the last checkpoint is step {saved}. Lower lr, or use "
            "precision='fp32'."
        )


def _judge_start(
    model: CellModel,
    validation: Loader,
    objective: Objective,
    precision: str,
    run: Run,
    track: Callable[[dict[str, Any]], None],
) -> float:
    """Validate the initial weights, which are the best so far, and return the loss."""
    found = evaluate(model, validation, objective, precision)
    if ranks.rank() == 0:
        _log_lines(run, [{"step": 0, "epoch": 0, "split": "validation", **found, "lr": 0.0}], track)
    _save_best(run, model)
    log.debug("starting from a validation loss of %.4g", found["loss"])
    return found["loss"]


@torch.no_grad()
def evaluate(
    model: CellModel, cells: Loader, objective: Objective, precision: str, relational_weight: float | None = None
) -> dict[str, float]:
    """Compute mean losses over all cells, the same for any number of ranks; masks are the same in every epoch.

    If batches have views, the loss includes the relational term with this weight.
    """
    model.eval()
    device = model.device
    sums, relation = Sums(objective.logs(model), device), torch.zeros((), dtype=torch.float64, device=device)
    with closing(cells.epoch(0, rank=ranks.rank(), world=ranks.world())) as read:
        for number, parts in enumerate(read):
            for batch in parts:
                batch = batch.to(device)
                with autocast(precision, device):
                    sums.add(objective(model, batch, number), batch)
                    if batch.view is not None:
                        relation += relational_loss(model, batch.view).sum
    totals = sums.reduced()
    if cells.reference is not None:
        ranks.sum_over_ranks(relation)
        totals = totals.with_term("relational", float(relation) / max(totals.n_cells, 1), relational_weight or 0.0)
    found = objective.report(dict(totals.means), 0)
    found.pop("mask_ratio", None)  # differs between batches
    return found


def _speed(totals: Totals, seconds: float, waited: float, updates: Updates) -> dict[str, float]:
    """Describe a step for the history: rates over all ranks, waiting and memory of this one.

    ``mfu`` is the share of the matrix rate of all ranks, if the operations can be counted. ``data_wait`` is the
    fraction of the time spent waiting for the batch, ``peak_memory`` is in GiB: of the GPU, or of the process on a CPU.
    """
    device = updates.device
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_memory()
    speed = {"cells_per_s": round(totals.n_cells / seconds, 2), "tokens_per_s": round(totals.n_tokens / seconds, 1)}
    # the first rank writes the history, and measures the rate while the others wait for it
    if totals.flops and ranks.rank() == 0:
        rate = ranks.world() * matrix_rate(device, updates.precision)
        speed["mfu"] = float(f"{totals.flops / seconds / rate:.3g}")
    return speed | {"data_wait": round(waited / seconds, 4), "peak_memory": round(used / 2**30, 3)}


def _resident_memory() -> int:
    """Return the largest memory of this process so far, in bytes."""
    # in kilobytes on Linux, in bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
