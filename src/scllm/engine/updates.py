"""Optimiser steps of a model: gradients over micro-batches and ranks, and what a checkpoint holds of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from scllm._log import log, warn
from scllm.engine import ranks, sharding
from scllm.engine.checkpoint import Checkpoints
from scllm.engine.config import Settings
from scllm.engine.device import autocast
from scllm.engine.estimate import training_flops
from scllm.engine.memory import TokenLimit, is_out_of_memory, longest, micro_batches
from scllm.engine.objectives import Objective
from scllm.engine.optim import optimizer
from scllm.engine.relational import Peers, without_noise
from scllm.engine.replicas import averaging, loss_module
from scllm.engine.totals import Sums, Totals
from scllm.kernels.draws import mix
from scllm.models.base import Batch, CellModel
from scllm.models.pruning import pruned_weights

__all__ = ["Updates"]

# A step whose loss or gradient is not finite is left out. If as many follow each other, training has diverged.
_MAX_SKIPPED = 5
# GradScaler begins at 65,536 and halves the scale at each overflow; below this, gradients of fp16 have no digits left
_LEAST_SCALE = 2.0**-10


class Updates:
    """Optimiser steps of a model."""

    def __init__(
        self,
        model: CellModel,
        objective: Objective,
        config: Settings,
        precision: str,
        limit: TokenLimit,
        largest: tuple[int, int] | None = None,
    ) -> None:
        self.model, self.objective, self.config, self.precision = model, objective, config, precision
        self.device = model.device
        self.in_shards = config.strategy == "fsdp"
        self.trained: list[Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        self.loss = loss_module(model, objective)
        self.optimizer = optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.pruned = pruned_weights(model)
        self.flops = training_flops(model, objective)
        self.n_skipped = self.skipped_in_a_row = 0
        self.limit, self.untried = limit, largest

    def update(self, parts: Sequence[Batch], step: int, lr: float, saved: int, *, asked: bool) -> tuple[Totals, float]:
        """Take one step on this rank's cells; return sums over all ranks, and the gradient's norm before clipping.

        ``asked`` says whether this rank asks for a checkpoint.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        if self.untried is not None:
            largest, self.untried = longest(parts[0], *self.untried), None
            self._fitting_gradients([largest], step, asked)
            self.optimizer.zero_grad(set_to_none=True)
        totals = self._fitting_gradients(parts, step, asked)
        self.scaler.unscale_(self.optimizer)
        norm = float(sharding.full_norm(self.trained, self.config.clip))
        loss = totals.means["loss"]
        # loss and norm are the same on all ranks, so all of them leave out the same steps
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            self.skipped_in_a_row = 0
            self.scaler.step(self.optimizer)
            with torch.no_grad():
                for weight, stays in self.pruned:
                    weight.mul_(stays)
            self.scaler.update()
            self._check_scale(step, saved)
        else:
            self._skip(step, loss, norm, saved)
        self.optimizer.zero_grad(set_to_none=True)
        return totals, norm

    def _skip(self, step: int, loss: float, norm: float, saved: int) -> None:
        """Leave out a step; raise if too many follow each other."""
        self.n_skipped += 1
        self.skipped_in_a_row += 1
        seen = f"The loss or its gradient is not finite at step {step + 1} (loss {loss}, gradient norm {norm:.3g})."
        if self.skipped_in_a_row == _MAX_SKIPPED:
            raise RuntimeError(
                f"{seen} That is the {_MAX_SKIPPED}th step in a row, so training has diverged. The weights were not "
                f"updated in these steps; the last checkpoint is step {saved}. Lower lr, or use precision='fp32'."
            )
        if ranks.rank() == 0:
            warn(f"{seen} The weights are not updated in this step ({self.n_skipped} left out so far).")

    def _check_scale(self, step: int, saved: int) -> None:
        """Raise if gradients overflow in fp16 at any scale."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < _LEAST_SCALE:
            raise RuntimeError(
                f"Gradients overflow in fp16 at step {step + 1}, even at loss scale {self.scaler.get_scale():.3g}. "
                f"The last checkpoint is step {saved}. Use precision='bf16' or 'fp32', with which the run can be "
                "resumed, or lower lr."
            )

    def _fitting_gradients(self, parts: Sequence[Batch], step: int, asked: bool) -> Totals:
        """Compute gradients in micro-batches that fit into memory."""
        while True:
            try:
                return self._gradients(parts, step, asked)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).splitlines()[0]
            # after the except clause, because the traceback holds what is in memory
            self._shrink(parts, said)

    def _shrink(self, parts: Sequence[Batch], said: str) -> None:
        """Halve the micro-batches; if other ranks wait for this one, note that and end."""
        tried = [piece for batch in parts for piece in micro_batches(batch, self.limit.n_tokens)]
        n_tokens = max(len(piece.genes) for piece in tried)
        if all(piece.n_cells <= 1 for piece in tried):
            raise RuntimeError(
                f"Expected enough memory for one cell of {n_tokens:,} tokens, but it ran out ({said}). Pass "
                "TrainConfig(checkpointing=True) or a smaller max_len, or train a smaller model."
            )
        self.limit.halve(n_tokens)
        self.limit.note()
        text = f"Memory ran out with {n_tokens:,} tokens in a micro-batch ({said})"
        if ranks.world() > 1:
            raise RuntimeError(
                f"{text}. When the run is resumed, it continues with at most {self.limit.n_tokens:,} and the same "
                "batch_size."
            )
        log.warning("%s; continuing with at most %d, and the same batch_size", text, self.limit.n_tokens)
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _micro_batches(self, parts: Sequence[Batch]) -> list[Batch]:
        """Cut this rank's cells of a step; if weights are sharded, all ranks get equally many parts."""
        pieces = [piece for batch in parts for piece in micro_batches(batch.to(self.device), self.limit.n_tokens)]
        if sharding.is_sharded(self.model) and math.isfinite(self.limit.n_tokens):
            n_parts = torch.tensor(len(pieces), device=self.device)
            ranks.largest_over_ranks(n_parts)
            pieces += [pieces[0].cells(0, 0)] * (int(n_parts) - len(pieces))
        return pieces

    def _gradients(self, parts: Sequence[Batch], step: int, asked: bool) -> Totals:
        """Compute gradients of the mean loss over all ranks; return means over all ranks."""
        self.model.at_step(step, self.config.random_state)
        sums = Sums(self.objective.logs(self.model), self.device, self.flops)
        pieces, relational = self._micro_batches(parts), self.config.relational
        with _seeded(self.device, self.config.random_state, step, ranks.rank()):
            for number, batch in enumerate(pieces, start=1):
                # replicas are averaged once, after the last term; shards cannot be divided before they are
                is_last = number == len(pieces) and (not relational or self.in_shards)
                with averaging(self.loss, self.model, now=is_last):
                    with autocast(self.precision, self.device):
                        loss = self.loss(batch, step)
                    self.scaler.scale(loss.sum).backward()
                sums.add(loss, batch)
            totals = sums.reduced(asked)
            gradients = [weight.grad for weight in self.trained if weight.grad is not None]
            # gradients are averaged over ranks, and their count is summed
            torch._foreach_div_(gradients, max(totals.count, 1) / ranks.world())
            if relational:
                totals = totals.with_term("relational", self._relate(pieces, totals.n_cells), self._weight)
        for weight in self.trained:
            # heads without labels contribute zeros
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return totals

    def _relate(self, pieces: Sequence[Batch], n_cells: int) -> float:
        """Add the gradient of the relational term; return its mean over the cells of all ranks."""
        views = [cast(Batch, batch.view) for batch in pieces]
        scale, total = 2 * self._weight * ranks.world() / max(n_cells, 1), torch.zeros((), device=self.device)
        with without_noise(self.model):
            # a single micro-batch is embedded once, and cells of several ones before any of them is compared
            peers = None if len(views) == 1 else Peers.embedded(self.model, views, self.precision)
            for number, view in enumerate(views, start=1):
                with averaging(self.loss, self.model, now=number == len(views)):
                    with autocast(self.precision, self.device):
                        loss = self.loss(view, None, peers)
                    self.scaler.scale(loss.sum * scale).backward()
                total += loss.sum.detach()
        ranks.sum_over_ranks(total)
        return float(total) / max(n_cells, 1)

    @property
    def _weight(self) -> float:
        """Weight of the relational term."""
        return self.config.relational_weight or 0.0

    def save(self, checkpoints: Checkpoints, step: int, standing: Mapping[str, Any]) -> None:
        """Write a checkpoint; all ranks must call this."""
        state = {"step": step, **standing, "scaler": self.scaler.state_dict(), "precision": self.precision}
        if self.in_shards:
            checkpoints.save_shards(step, sharding.state_in_shards(self.model, self.optimizer), state)
        elif ranks.rank() == 0:
            tensors = {"model": sharding.weights(self.model), "optimizer": self.optimizer.state_dict()}
            checkpoints.save(step, {**tensors, **state})

    def restore(self, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Read the newest checkpoint that can be read; ``None`` if nothing has been saved yet."""
        found, damaged = checkpoints.newest_first(), []
        for path in found:
            try:
                state = self._read(checkpoints, path)
            except ValueError as error:
                damaged.append(error)
                continue
            if damaged and ranks.rank() == 0:
                warn(f"{damaged[0]} Resuming from the one before, step {state['step']}.")
            if state["scaler"]:
                # empty if the run has not used loss scaling so far
                self.scaler.load_state_dict(state["scaler"])
            return state
        if damaged:
            raise damaged[0]
        return None

    def _read(self, checkpoints: Checkpoints, path: Path) -> dict[str, Any]:
        """Read a checkpoint into model and optimiser; return the rest of the state."""
        if path.is_file():
            state = checkpoints.read(path)
            self.model.load_state_dict(state.pop("model"))
            self.optimizer.load_state_dict(state.pop("optimizer"))
            return state
        tensors = sharding.state_in_shards(self.model, self.optimizer)
        state = checkpoints.read_shards(path, tensors)
        sharding.load_state_in_shards(self.model, self.optimizer, tensors)
        return state


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
