"""The one training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from scllm._log import log, show_progress
from scllm.data.run_files import append_history, cut_history
from scllm.engine import checkpoint, ranks, sharding
from scllm.engine.config import TrainConfig
from scllm.engine.device import autocast
from scllm.engine.loader import Loader
from scllm.engine.objectives import Loss, Objective
from scllm.engine.optim import learning_rate, optimizer, train_mode, without_dropout
from scllm.engine.run import Run
from scllm.kernels.draws import mix
from scllm.models.base import Batch, CellModel

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
    rank, world, device, sharded = ranks.rank(), ranks.world(), model.device, sharding.is_sharded(model)
    per_epoch = batches.n_batches()
    n_steps = config.steps or per_epoch * (config.epochs or 1)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if config.use_dropout is False:
        without_dropout(model)
    optimise = optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    step, best, since_best = _resume(run, model, optimise, scaler, precision)
    saved = step
    if from_start and validation is not None and step == 0:
        best = _judge_start(model, validation, objective, precision, run, track)
    with tqdm(total=n_steps, initial=step, desc="training", unit="step", disable=not show_progress()) as bar:
        while step < n_steps and (config.patience is None or since_best < config.patience):
            epoch = step // per_epoch
            began = time.perf_counter()
            here = {"start": step % per_epoch, "rank": rank, "world": world, "parts": config.accumulate}
            with closing(batches.epoch(epoch, **here)) as read:
                for parts in read:
                    lr = learning_rate(step, epoch, n_steps, config)
                    for group in optimise.param_groups:
                        group["lr"] = lr * group["scale"]
                    train_mode(model)
                    model.at_step(step, config.random_state or 0)
                    totals = _Totals(objective.logs(model), device)
                    with _seeded(device, config.random_state or 0, step, rank):
                        for batch in parts:
                            batch = batch.to(device)
                            with autocast(precision, device):
                                loss = objective(model, batch, step)
                            scaler.scale(loss.sum).backward()
                            totals.add(loss, batch)
                    for weight in trained:
                        # ranks without cells, and heads without labels, contribute nothing
                        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                    if not sharded:
                        ranks.sum_over_ranks([weight.grad for weight in trained])  # type: ignore[misc]
                    means, count, n_cells = totals.reduced()
                    scaler.unscale_(optimise)
                    # sharded gradients were averaged over ranks on the way
                    torch._foreach_div_([weight.grad for weight in trained], max(count, 1) / (world if sharded else 1))
                    norm = sharding.full_norm(trained, config.clip)
                    if not math.isfinite(means["loss"]) or not (norm.isfinite() or scaler.is_enabled()):
                        raise RuntimeError(
                            f"the loss or its gradient is not finite at step {step + 1} (loss {means['loss']}, norm "
                            f"{norm:.3g}), finite numbers expected. Nothing was updated; the last checkpoint is step "
                            f"{saved}. Lower lr, or use precision='fp32'."
                        )
                    scaler.step(optimise)
                    scaler.update()
                    optimise.zero_grad(set_to_none=True)
                    step += 1

                    now = time.perf_counter()
                    cells_per_s, began = n_cells / (now - began), now
                    line = {
                        "step": step,
                        "epoch": epoch,
                        "split": "train",
                        **objective.report(means, step - 1),
                        "lr": lr,
                    }
                    lines = [line | {"cells_per_s": round(cells_per_s, 2)}] if step % config.log_every == 0 else []
                    ends = step % per_epoch == 0 or step == n_steps
                    if ends:
                        found = line if validation is None else evaluate(model, validation, objective, precision)
                        if validation is not None:
                            lines.append({"step": step, "epoch": epoch, "split": "validation", **found, "lr": lr})
                        if not math.isfinite(found["loss"]):
                            raise RuntimeError(
                                f"the validation loss is {found['loss']} at step {step}, a finite number expected. The "
                                f"last checkpoint is step {saved}. Lower lr, or use precision='fp32'."
                            )
                        # without validation cells the last weights are the best
                        score = -step if validation is None else found["loss"]
                        since_best = 0 if score < best else since_best + 1
                        log.info(
                            "epoch %d, step %d of %d: loss %.4g, %.4g on validation",
                            epoch,
                            step,
                            n_steps,
                            means["loss"],
                            found["loss"],
                        )
                    if rank == 0:
                        with checkpoint.writing(run.history):
                            append_history(run.history, lines)
                        for logged in lines:
                            track(logged)
                    saves = ends or bool(config.save_every and step % config.save_every == 0)
                    if saves and (rank == 0 or sharded):
                        state = {
                            "model": sharding.weights(model),
                            "optimizer": sharding.optimizer_state(model, optimise),
                            "scaler": scaler.state_dict(),
                            "precision": precision,
                        }
                    if rank == 0 and ends and since_best == 0:
                        checkpoint.save(run.best, state["model"])
                    best = min(best, score) if ends else best
                    if saves:
                        saved = step
                        if rank == 0:
                            checkpoint.save(run.last, state | {"step": step, "best": best, "since_best": since_best})
                    bar.set_postfix(loss=f"{means['loss']:.4g}", refresh=False)
                    bar.update()
                    began = time.perf_counter() if ends else began
                    if step >= n_steps:
                        break


def _resume(
    run: Run, model: CellModel, optimise: torch.optim.Optimizer, scaler: torch.amp.GradScaler, precision: str
) -> tuple[int, float, int]:
    """Step, best validation loss and epochs since then at the last checkpoint; all of it goes back there."""
    state = checkpoint.restore(run.last)
    ranks.wait_for_all()
    if ranks.rank() == 0:
        cut_history(run.history, -1 if state is None else state["step"])
    if state is None:
        return 0, math.inf, 0
    sharding.load_weights(model, state["model"])
    sharding.load_optimizer(model, optimise, state["optimizer"])
    if state["scaler"]:
        # empty where the run has not scaled its loss so far
        scaler.load_state_dict(state["scaler"])
    before = state.get("precision", precision)
    log.info("continuing at step %d%s", state["step"], "" if before == precision else f", in {before} until there")
    return state["step"], state["best"], state["since_best"]


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
        line = {"step": 0, "epoch": 0, "split": "validation", **found, "lr": 0.0}
        with checkpoint.writing(run.history):
            append_history(run.history, [line])
        checkpoint.save(run.best, weights)
        track(line)
    log.info("before the first step: loss %.4g on validation", found["loss"])
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
