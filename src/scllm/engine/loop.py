"""The training loop, used for pretraining and fine-tuning."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scllm._log import log, show_progress
from scllm.data.run_files import append_history, cut_history
from scllm.engine import checkpoint, ranks, sharding
from scllm.engine.config import Settings
from scllm.engine.device import autocast
from scllm.engine.estimate import matrix_rate, training_flops
from scllm.engine.loader import Loader
from scllm.engine.mean_prediction import mean_prediction
from scllm.engine.objectives import Loss, Objective
from scllm.engine.optim import learning_rate, optimizer, train_mode
from scllm.engine.replicas import averaging, loss_module
from scllm.engine.run import Run
from scllm.engine.saving import Saving
from scllm.kernels.draws import mix
from scllm.models.base import Batch, CellModel
from scllm.models.pruning import pruned_weights

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
    updates = _Updates(model, objective, config, precision)
    step, best, since_best = _resume(run, updates)
    saved = step
    if from_start and validation is not None and step == 0:
        best = _judge_start(model, validation, objective, precision, run, track)
    baseline = mean_prediction(model, objective, batches, validation) if rank == 0 else {}
    quiet, saving = not show_progress(), Saving(config)
    bar = tqdm(total=n_steps, initial=step, desc="training", unit="step", disable=quiet, leave=False)
    with bar, saving.listening():
        while step < n_steps and (config.patience is None or since_best < config.patience):
            epoch = step // per_epoch
            train_mode(model)  # because validation at the end of an epoch switches to evaluation mode
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
                    if step % config.log_every == 0:
                        lines.append(line | {"grad_norm": float(f"{norm:.6g}"), **speed})
                    ends = step % per_epoch == 0 or step == n_steps
                    if ends:
                        found = line if validation is None else evaluate(model, validation, objective, precision)
                        _check_validation(found["loss"], step, saved)
                        if validation is not None:
                            lines.append({"step": step, "epoch": epoch, "split": "validation", **found, "lr": lr})
                        # without validation cells, the last weights count as the best
                        score = -step if validation is None else found["loss"]
                        best, since_best = (score, 0) if score < best else (best, since_best + 1)
                        validated = "" if validation is None else f", {found['loss']:.4g} on validation"
                        # a progress bar shows the same
                        say = log.info if quiet else log.debug
                        text = "epoch %d of %d, step %d of %d: loss %.4g%s"
                        say(text, epoch + 1, n_epochs, step, n_steps, means["loss"], validated)
                    if rank == 0:
                        _log_lines(run, [one | baseline for one in lines], track)
                    if ends or saving.is_due(step, asked=totals.asked):
                        standing = {"step": step, "best": best, "since_best": since_best}
                        _save(run, updates, standing, is_best=ends and since_best == 0)
                        saved = step
                        saving.saved()
                    bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
                    bar.update()
                    began = time.perf_counter()


class _Updates:
    """Optimiser steps of a model."""

    def __init__(self, model: CellModel, objective: Objective, config: Settings, precision: str) -> None:
        self.model, self.objective, self.config, self.precision = model, objective, config, precision
        self.device = model.device
        self.sharded = sharding.is_sharded(model)
        self.trained: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.loss = loss_module(model, objective)
        self.optimizer = optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.pruned = pruned_weights(model)
        self.flops = training_flops(model, objective)

    def update(self, parts: Sequence[Batch], step: int, lr: float, saved: int, *, asked: bool) -> tuple[_Totals, float]:
        """Take one step on this rank's cells; return sums over all ranks, and the gradient's norm before clipping.

        ``asked`` says whether this rank asks for a checkpoint.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        totals = self._gradients(parts, step, asked)
        gradients = [cast(Tensor, weight.grad) for weight in self.trained]
        self.scaler.unscale_(self.optimizer)
        # gradients are averaged over ranks, and their count is summed
        torch._foreach_div_(gradients, max(totals.count, 1) / ranks.world())
        norm = sharding.full_norm(self.trained, self.config.clip)
        loss = totals.means["loss"]
        if not math.isfinite(loss) or not (norm.isfinite() or self.scaler.is_enabled()):
            raise RuntimeError(
                f"The loss or its gradient is not finite at step {step + 1} (loss {loss}, gradient norm "
                f"{norm:.3g}). The weights were not updated; the last checkpoint is step {saved}. Lower lr, or use "
                "precision='fp32'."
            )
        self.scaler.step(self.optimizer)
        with torch.no_grad():
            for weight, stays in self.pruned:
                weight.mul_(stays)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return totals, float(norm)

    def _gradients(self, parts: Sequence[Batch], step: int, asked: bool) -> _Totals:
        """Average gradients of the summed loss over ranks; return sums over all ranks."""
        self.model.at_step(step, self.config.random_state)
        sums = _Sums(self.objective.logs(self.model), self.device, self.flops)
        with _seeded(self.device, self.config.random_state, step, ranks.rank()):
            for number, batch in enumerate(parts, start=1):
                batch = batch.to(self.device)
                with averaging(self.loss, self.model, now=number == len(parts)):
                    with autocast(self.precision, self.device):
                        loss = self.loss(batch, step)
                    self.scaler.scale(loss.sum).backward()
                sums.add(loss, batch)
        for weight in self.trained:
            # heads without labels contribute zeros
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return sums.reduced(asked)

    def state(self) -> dict[str, Any]:
        """Return the state to resume from; if the model is sharded, all ranks must call this."""
        return {
            "model": sharding.weights(self.model),
            "optimizer": sharding.optimizer_state(self.model, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state` returned."""
        sharding.load_weights(self.model, state["model"])
        sharding.load_optimizer(self.model, self.optimizer, state["optimizer"])
        if state["scaler"]:
            # empty if the run has not used loss scaling so far
            self.scaler.load_state_dict(state["scaler"])


def _resume(run: Run, updates: _Updates) -> tuple[int, float, int]:
    """Load the last checkpoint; return its step, best validation loss and the number of epochs since then."""
    state = checkpoint.restore(run.last)
    ranks.wait_for_all()
    if ranks.rank() == 0:
        cut_history(run.history, -1 if state is None else state["step"])
    if state is None:
        return 0, math.inf, 0
    updates.restore(state)
    before = state.get("precision", updates.precision)
    changed = "" if before == updates.precision else f" in {updates.precision} (trained in {before} so far)"
    log.info("resuming at step %d%s", state["step"], changed)
    return state["step"], state["best"], state["since_best"]


def _save(run: Run, updates: _Updates, standing: dict[str, float], *, is_best: bool) -> None:
    if ranks.rank() != 0 and not updates.sharded:
        return
    state = updates.state()
    if ranks.rank() == 0:
        if is_best:
            checkpoint.save(run.best, state["model"])
        checkpoint.save(run.last, state | standing)


def _log_lines(run: Run, lines: list[dict[str, Any]], track: Callable[[dict[str, Any]], None]) -> None:
    with checkpoint.writing(run.history):
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
    weights = sharding.weights(model)
    if ranks.rank() == 0:
        _log_lines(run, [{"step": 0, "epoch": 0, "split": "validation", **found, "lr": 0.0}], track)
        checkpoint.save(run.best, weights)
    log.debug("starting from a validation loss of %.4g", found["loss"])
    return found["loss"]


@contextmanager
def _seeded(device: torch.device, random_state: int, step: int, rank: int) -> Iterator[None]:
    """Seed dropout for one step and leave the caller's random generators unchanged."""
    seed = int(mix(random_state, step, rank)) & (1 << 63) - 1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # torch.manual_seed would seed all GPUs, also those whose state is not restored
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@torch.no_grad()
def evaluate(model: CellModel, cells: Loader, objective: Objective, precision: str) -> dict[str, float]:
    """Compute mean losses over all cells, the same for any number of ranks; masks are the same in every epoch."""
    model.eval()
    device = model.device
    sums = _Sums(objective.logs(model), device)
    with closing(cells.epoch(0, rank=ranks.rank(), world=ranks.world())) as read:
        for number, parts in enumerate(read):
            for batch in parts:
                batch = batch.to(device)
                with autocast(precision, device):
                    sums.add(objective(model, batch, number), batch)
    found = objective.report(sums.reduced().means, 0)
    found.pop("mask_ratio", None)  # differs between batches
    return found


@dataclass(frozen=True)
class _Totals:
    """What was computed over all micro-batches and ranks."""

    means: dict[str, float]  # losses, divided by `count`
    count: float
    n_cells: int
    n_tokens: int
    flops: float  # counted operations, 0 if they cannot be counted
    asked: bool  # whether a rank asks for a checkpoint


def _speed(totals: _Totals, seconds: float, waited: float, updates: _Updates) -> dict[str, float]:
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


class _Sums:
    """Sums over micro-batches and ranks, which are divided once at the end."""

    def __init__(
        self, names: Sequence[str], device: torch.device, flops: Callable[[Sequence[int]], float] | None = None
    ) -> None:
        # with all names from the start, because ranks without cells take part in the sum too
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("loss", *names)}
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.n_cells = self.n_tokens = 0
        self.flops, self.count_flops = 0.0, flops

    def add(self, loss: Loss, batch: Batch) -> None:
        for name, value in {"loss": loss.sum, **loss.logged}.items():
            self.sums[name] += value.detach()
        self.count += loss.count
        self.n_cells += batch.n_cells
        self.n_tokens += len(batch.genes)
        if self.count_flops is not None:
            self.flops += self.count_flops(batch.lengths)

    def reduced(self, asked: bool = False) -> _Totals:
        """Sum over ranks."""
        sizes = self.count.new_tensor([self.n_cells, self.n_tokens, self.flops, asked])
        flat = torch.cat([torch.stack([*self.sums.values(), self.count]), sizes])
        ranks.sum_over_ranks(flat)
        *sums, count, n_cells, n_tokens, flops, n_asked = flat.tolist()
        means = {name: value / max(count, 1) for name, value in zip(self.sums, sums, strict=True)}
        return _Totals(means, count, int(n_cells), int(n_tokens), flops, n_asked > 0)
