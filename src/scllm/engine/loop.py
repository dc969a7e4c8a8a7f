"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scllm._log import log, show_progress
from scllm.data.run_files import append_history, cut_history
from scllm.engine import checkpoint, ranks, sharding
from scllm.engine.config import TrainConfig
from scllm.engine.device import autocast
from scllm.engine.loader import Loader
from scllm.engine.objectives import Loss, Objective
from scllm.engine.optim import learning_rate, optimizer, train_mode
from scllm.engine.run import Run
from scllm.kernels.draws import mix
from scllm.models.base import Batch, CellModel
from scllm.models.pruning import pruned_weights

__all__ = ["fit"]


def fit(
    model: CellModel,
    batches: Loader,
    objective: Objective,
    config: TrainConfig,
    *,
    run: Run,
    validation: Loader | None = None,
    from_start: bool = False,
    precision: str = "fp32",
    track: Callable[[dict[str, Any]], None] = lambda line: None,
) -> None:
    """Train a model in place, from wherever the run directory says it is, to the end.

    Parameters
    ----------
    model
        On its device. Weights that are not to be trained have ``requires_grad=False``.
    batches
        Training cells.
    objective
        What to train for.
    config
        Settings, none of them open.
    run
        Receives ``history.jsonl``, ``last.pt`` and ``best_model.pt``.
    validation
        Cells to choose the best weights by; without them the last weights are the best.
    from_start
        Whether the weights as they come may be the best (a model to fine-tune): they are validated as step 0.
    precision
        ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    track
        Is given each line of the history, on the first rank.
    """
    rank, world, per_epoch = ranks.rank(), ranks.world(), batches.n_batches()
    n_steps = config.steps or per_epoch * (config.epochs or 1)
    updates = _Updates(model, objective, config, precision)
    step, best, since_best = _resume(run, updates)
    saved = step
    if from_start and validation is not None and step == 0:
        best = _judge_start(model, validation, objective, precision, run, track)
    quiet = not show_progress()
    with tqdm(total=n_steps, initial=step, desc="training", unit="step", disable=quiet, leave=False) as bar:
        while step < n_steps and (config.patience is None or since_best < config.patience):
            epoch = step // per_epoch
            train_mode(model)  # validation, at the end of an epoch, leaves it
            read = batches.epoch(epoch, start=step % per_epoch, rank=rank, world=world, parts=config.accumulate)
            with closing(read):
                began = time.perf_counter()
                for parts in islice(read, n_steps - step):
                    lr = learning_rate(step, epoch, n_steps, config)
                    means, n_cells = updates.update(parts, step, lr, saved)
                    step += 1
                    seconds = time.perf_counter() - began
                    report = objective.report(means, step - 1)
                    line: dict[str, Any] = {"step": step, "epoch": epoch, "split": "train", **report, "lr": lr}
                    lines = []
                    if step % config.log_every == 0:
                        lines.append(line | {"cells_per_s": round(n_cells / seconds, 2)})
                    ends = step % per_epoch == 0 or step == n_steps
                    if ends:
                        found = line if validation is None else evaluate(model, validation, objective, precision)
                        _check_validation(found["loss"], step, saved)
                        if validation is not None:
                            lines.append({"step": step, "epoch": epoch, "split": "validation", **found, "lr": lr})
                        # without validation cells the last weights are the best
                        score = -step if validation is None else found["loss"]
                        best, since_best = (score, 0) if score < best else (best, since_best + 1)
                        validated = "" if validation is None else f", {found['loss']:.4g} on validation"
                        # where there is a bar it says so
                        say = log.info if quiet else log.debug
                        say("epoch %d, step %d of %d: loss %.4g%s", epoch, step, n_steps, means["loss"], validated)
                    if rank == 0:
                        _log_lines(run, lines, track)
                    if ends or (config.save_every and step % config.save_every == 0):
                        standing = {"step": step, "best": best, "since_best": since_best}
                        _save(run, updates, standing, is_best=ends and since_best == 0)
                        saved = step
                    bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
                    bar.update()
                    began = time.perf_counter()


class _Updates:
    """Updates of a model's weights, one a step."""

    def __init__(self, model: CellModel, objective: Objective, config: TrainConfig, precision: str) -> None:
        self.model, self.objective, self.config, self.precision = model, objective, config, precision
        self.device = model.device
        self.sharded = sharding.is_sharded(model)
        self.trained: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.pruned = pruned_weights(model)

    def update(self, parts: Sequence[Batch], step: int, lr: float, saved: int) -> tuple[dict[str, float], int]:
        """Take one step on this rank's cells; means of the losses and the number of cells, over all ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        means, count, n_cells = self._gradients(parts, step)
        gradients = [cast(Tensor, weight.grad) for weight in self.trained]
        if not self.sharded:
            ranks.sum_over_ranks(gradients)
        self.scaler.unscale_(self.optimizer)
        # sharded gradients were averaged over ranks on the way
        cells = max(count, 1) / (ranks.world() if self.sharded else 1)
        torch._foreach_div_(gradients, cells)
        norm = sharding.full_norm(self.trained, self.config.clip)
        if not math.isfinite(means["loss"]) or not (norm.isfinite() or self.scaler.is_enabled()):
            raise RuntimeError(
                f"the loss or its gradient is not finite at step {step + 1} (loss {means['loss']}, norm {norm:.3g}), "
                f"finite numbers expected. Nothing was updated; the last checkpoint is step {saved}. Lower lr, or use "
                "precision='fp32'."
            )
        self.scaler.step(self.optimizer)
        with torch.no_grad():
            for weight, stays in self.pruned:
                weight.mul_(stays)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return means, n_cells

    def _gradients(self, parts: Sequence[Batch], step: int) -> tuple[dict[str, float], float, int]:
        """Sum this rank's gradients; means of the losses, what they are means over, and the cells, over all ranks."""
        self.model.at_step(step, self.config.random_state or 0)
        totals = _Totals(self.objective.logs(self.model), self.device)
        with _seeded(self.device, self.config.random_state or 0, step, ranks.rank()):
            for batch in parts:
                batch = batch.to(self.device)
                with autocast(self.precision, self.device):
                    loss = self.objective(self.model, batch, step)
                self.scaler.scale(loss.sum).backward()
                totals.add(loss, batch)
        for weight in self.trained:
            # ranks without cells, and heads without labels, contribute nothing
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return totals.reduced()

    def state(self) -> dict[str, Any]:
        """What training goes on from; where the model is sharded, all ranks must ask for it."""
        return {
            "model": sharding.weights(self.model),
            "optimizer": sharding.optimizer_state(self.model, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what :meth:`state` gave."""
        sharding.load_weights(self.model, state["model"])
        sharding.load_optimizer(self.model, self.optimizer, state["optimizer"])
        if state["scaler"]:
            # empty where the run has not scaled its loss so far
            self.scaler.load_state_dict(state["scaler"])


def _resume(run: Run, updates: _Updates) -> tuple[int, float, int]:
    """Step, best validation loss and epochs since then at the last checkpoint; all of it goes back there."""
    state = checkpoint.restore(run.last)
    ranks.wait_for_all()
    if ranks.rank() == 0:
        cut_history(run.history, -1 if state is None else state["step"])
    if state is None:
        return 0, math.inf, 0
    updates.restore(state)
    before = state.get("precision", updates.precision)
    changed = "" if before == updates.precision else f", in {before} until there"
    log.info("continuing at step %d%s", state["step"], changed)
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
            f"the validation loss is {loss} at step {step}, a finite number expected. The last checkpoint is step "
            f"{saved}. Lower lr, or use precision='fp32'."
        )


def _judge_start(
    model: CellModel,
    validation: Loader,
    objective: Objective,
    precision: str,
    run: Run,
    track: Callable[[dict[str, Any]], None],
) -> float:
    """Validation loss of the weights as they came, which are the best so far."""
    found = evaluate(model, validation, objective, precision)
    weights = sharding.weights(model)
    if ranks.rank() == 0:
        _log_lines(run, [{"step": 0, "epoch": 0, "split": "validation", **found, "lr": 0.0}], track)
        checkpoint.save(run.best, weights)
    log.debug("before the first step: loss %.4g on validation", found["loss"])
    return found["loss"]


@contextmanager
def _seeded(device: torch.device, random_state: int, step: int, rank: int) -> Iterator[None]:
    """Dropout is a function of the step too: seeded anew, and the caller's generators left as they were."""
    seed = int(mix(random_state, step, rank)) & (1 << 63) - 1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # torch.manual_seed would seed every GPU there is, also those whose state is not put back
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@torch.no_grad()
def evaluate(model: CellModel, cells: Loader, objective: Objective, precision: str) -> dict[str, float]:
    """Losses over all cells of a loader, the same for any number of ranks. Masks do not change between epochs."""
    model.eval()
    device = model.device
    totals = _Totals(objective.logs(model), device)
    with closing(cells.epoch(0, rank=ranks.rank(), world=ranks.world())) as read:
        for number, parts in enumerate(read):
            for batch in parts:
                batch = batch.to(device)
                with autocast(precision, device):
                    totals.add(objective(model, batch, number), batch)
    means, _, _ = totals.reduced()
    found = objective.report(means, 0)
    found.pop("mask_ratio", None)  # every batch has its own
    return found


class _Totals:
    """Sums over micro-batches and ranks, divided once."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        # named from the start: a rank without cells must take part in the sum
        self.sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in ("loss", *names)}
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.n_cells = 0

    def add(self, loss: Loss, batch: Batch) -> None:
        for name, value in {"loss": loss.sum, **loss.logged}.items():
            self.sums[name] += value.detach()
        self.count += loss.count
        self.n_cells += batch.n_cells

    def reduced(self) -> tuple[dict[str, float], float, int]:
        """Means by name, the count they were divided by, and the number of cells."""
        flat = torch.stack([*self.sums.values(), self.count, self.count.new_tensor(self.n_cells)])
        ranks.sum_over_ranks([flat])
        *sums, count, n_cells = flat.tolist()
        return {name: value / max(count, 1) for name, value in zip(self.sums, sums, strict=True)}, count, int(n_cells)
