"""Parts of ``benchmarks.gpu`` that measure speed and memory: rows 7, 8 and 9, and the Performers at full length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks._cells import made_cells, table
from benchmarks._gpu_cases import Cases, Scale
from benchmarks.row06_pretraining import Step, training_flop
from benchmarks.row07_gpu import RUN_CELLS, base_model, gemm_rate_bf16, made_batch, seconds, twins
from benchmarks.row08_geneformer import OurStep, TheirStep
from scllm import models, tl
from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.engine.device import autocast
from scllm.engine.loader import Loader
from scllm.engine.objectives import objective_from_dict
from scllm.engine.optim import optimizer, train_mode
from scllm.models.base import Batch, CellModel

__all__ = ["embedding", "geneformer", "lengths_of", "performers", "pretraining", "read_batch"]


# Every twentieth part of the tokens of blood cells with their 1,200 most variable genes, ``<cls>`` included, see
# `_cells.blood_1200`: finding those genes would take longer than measuring. The longest cell is as long as in the seed.
REAL_LENGTHS = (12, 59, 77, 88, 95, 102, 107, 113, 119, 124, 129, 135, 143, 152, 165, 188, 218, 252, 288, 330, 481)


def lengths_of(scale: Scale) -> dict[str, np.ndarray]:
    """Return tokens of cells: all of the longest length, and with the distribution of real cells."""
    places = np.random.default_rng(0).random(2_000)
    real = np.interp(places, np.linspace(0, 1, len(REAL_LENGTHS)), REAL_LENGTHS)
    real = np.maximum(2, real * scale.longest / REAL_LENGTHS[-1]).astype(np.int64)
    return {f"{scale.full:,} tokens": np.full(len(real), scale.full), "real lengths": real}


def pretraining(cases: Cases) -> None:
    """Row 7: a pretraining step of scGPT in bf16, with and without ``torch.compile``, beside the padded stack."""
    scale = cases.scale
    rate = gemm_rate_bf16(scale.matrix, cases.device)
    cases.put("matrix rate", {"tflop_per_s": rate / 1e12})
    lengths = lengths_of(scale)
    for compiled in (False, True):
        for n_cells in scale.batch_sizes:
            for name, of_cells in reversed(lengths.items()):
                case = f"{n_cells} cells, {name}, {'compiled' if compiled else 'as it is'}"
                cases.measure(case, _training, cases, of_cells, n_cells, rate, compiled)
        if not compiled:
            for name, of_cells in reversed(lengths.items()):
                cases.measure(f"{scale.batch_sizes[0]} cells, {name}, beside padded", _beside_padded, cases, of_cells)


def _training(cases: Cases, lengths: np.ndarray, n_cells: int, rate: float, compiled: bool) -> dict[str, Any]:
    batch = made_batch(lengths, n_cells, cases.device, cases.scale.n_tokens)
    model = base_model(cases.scale.n_tokens, cases.scale.size).to(cases.device)
    model.speed_up(compile=compiled)
    step = partial(Step(model, batch), "bf16")
    first = seconds(step)  # with the time that compiling takes
    found = _timed(step, training_flop(model, batch.lengths), batch, rate, cases.scale.rounds)
    minutes = RUN_CELLS / n_cells * found["step_s"] / 60
    return found | {"first_step_s": first, "minutes_for_300000_cells_x_6": minutes}


def _timed(step: Callable[[], object], flop: float, batch: Batch, rate: float, rounds: int) -> dict[str, Any]:
    """Time a step and measure its memory."""
    step()
    cuda = batch.genes.is_cuda
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    second = float(np.median([seconds(step) for _ in range(rounds)]))
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    n_tokens = len(batch.genes)
    return {
        "step_s": second,
        "cells_per_s": batch.n_cells / second,
        "tokens_per_s": n_tokens / second,
        "tokens_per_cell": n_tokens / batch.n_cells,
        "longest_cell": max(batch.lengths),
        "mfu": flop / second / rate,
        "peak_gib": peak / 2**30,
        "kb_per_token": (peak - before) / n_tokens / 1e3,
    }


def _beside_padded(cases: Cases, lengths: np.ndarray) -> dict[str, Any]:
    n_cells = cases.scale.batch_sizes[0]
    batch = made_batch(lengths, n_cells, cases.device, cases.scale.n_tokens)
    both = twins(cases.device, cases.scale.n_tokens, cases.scale.size)
    ours, theirs = (partial(Step(model, batch), "bf16") for model in both)
    losses = [step.func.loss("bf16").item() for step in (ours, theirs)]
    ours(), theirs()
    pairs = np.array([(seconds(ours), seconds(theirs)) for _ in range(cases.scale.rounds)])
    return _ratio(pairs) | {"loss_difference": abs(losses[0] - losses[1]) / abs(losses[1])}


def _ratio(pairs: np.ndarray) -> dict[str, float]:
    ratios = pairs[:, 1] / pairs[:, 0]
    return {
        "ratio": float(np.median(ratios)),
        "ratio_min": float(ratios.min()),
        "ratio_max": float(ratios.max()),
        "ours_s": float(np.median(pairs[:, 0])),
        "theirs_s": float(np.median(pairs[:, 1])),
    }


def embedding(cases: Cases) -> None:
    """Row 9: embedding in bf16 beside the padded stack in fp32, and the verb from counts to ``obsm``."""
    rate = gemm_rate_bf16(cases.scale.matrix, cases.device)
    cases.put("matrix rate", {"tflop_per_s": rate / 1e12})
    for name, lengths in lengths_of(cases.scale).items():
        cases.measure(f"{cases.scale.batch_sizes[0]} cells, {name}", _embedding, cases, lengths, rate)
    cases.measure("tl.embed", _embed_verb, cases)


@torch.inference_mode()
def _embedding(cases: Cases, lengths: np.ndarray, rate: float) -> dict[str, Any]:
    batch = made_batch(lengths, cases.scale.batch_sizes[0], cases.device, cases.scale.n_tokens)
    packed, padded = (model.eval() for model in twins(cases.device, cases.scale.n_tokens, cases.scale.size))
    packed.to(torch.bfloat16)
    found, expected = (model.embed(batch).float() for model in (packed, padded))
    calls = [partial(model.embed, batch) for model in (packed, padded)]
    pairs = np.array([[seconds(call) for call in calls] for _ in range(cases.scale.rounds)])
    ratio = _ratio(pairs)
    return ratio | {
        "cells_per_s": batch.n_cells / ratio["ours_s"],
        "mfu": training_flop(packed, batch.lengths) / 3 / ratio["ours_s"] / rate,
        "lowest_cosine": F.cosine_similarity(found, expected).min().item(),
    }


def _embed_verb(cases: Cases) -> dict[str, Any]:
    scale = cases.scale
    cells = table(made_cells(scale.n_embedded, scale.full - 1, scale.full // 8))
    model = models.build("scgpt", vocab=cells.var_names, size=scale.size).eval()
    tl.embed(cells[:64].copy(), model, device=cases.device)
    second = seconds(lambda: tl.embed(cells, model, device=cases.device))
    return {"cells_per_s": cells.n_obs / second, "tokens_per_cell": cells.X.nnz / cells.n_obs + 1, "seconds": second}


def geneformer(cases: Cases) -> None:
    """Row 8: a pretraining step of Geneformer in bf16 beside BertForMaskedLM on padded cells."""
    scale = cases.scale
    rate = gemm_rate_bf16(scale.matrix, cases.device)
    cases.put("matrix rate", {"tflop_per_s": rate / 1e12})
    rng = np.random.default_rng(0)
    longest = scale.geneformer_length
    # Genecorpus has about half as many genes a cell as the model reads
    ragged = np.clip(rng.lognormal(np.log(longest / 2), 0.5, scale.geneformer_cells), 8, longest).astype(int)
    for name, lengths in ((f"{longest:,} tokens", np.full(scale.geneformer_cells, longest)), ("ragged", ragged)):
        cases.measure(name, _geneformer, cases, lengths, rate)


def _geneformer(cases: Cases, lengths: np.ndarray, rate: float) -> dict[str, Any]:
    n_genes, longest = (20_271, 4_096) if cases.scale.geneformer != "tiny" else (300, 40)
    torch.manual_seed(0)
    model = models.build(
        "geneformer",
        vocab=[f"G{i}" for i in range(n_genes)],
        size=cases.scale.geneformer,
        dropout=0.0,
        max_len=longest,
    )
    rng = np.random.default_rng(0)
    specials = len(model.vocab) - n_genes
    genes = torch.from_numpy(np.concatenate([rng.permutation(n_genes)[:n] + specials for n in lengths]))
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    keys = torch.arange(len(lengths))
    batch = Batch(genes, None, ends, tuple(map(int, lengths)), keys).to(cases.device)
    theirs = TheirStep(model, batch)
    theirs.model.to(cases.device)
    ours = OurStep(model.to(cases.device), batch)
    losses = [_in_bf16(step, cases.device, train=False) for step in (ours, theirs)]
    calls = [partial(_in_bf16, step, cases.device) for step in (ours, theirs)]
    found = _timed(calls[0], training_flop(model, batch.lengths), batch, rate, cases.scale.rounds)
    calls[1]()
    pairs = np.array([[seconds(call) for call in calls] for _ in range(cases.scale.rounds)])
    return found | _ratio(pairs) | {"loss_difference": abs(losses[0] - losses[1]) / abs(losses[1])}


def _in_bf16(step: OurStep | TheirStep, device: str, train: bool = True) -> float | None:
    with autocast("bf16", torch.device(device)):
        loss = step.loss()
    if not train:
        return loss.item()
    loss.backward()
    step.optimise.step()
    step.optimise.zero_grad(set_to_none=True)
    return None


def read_batch(model: CellModel, adata: Any, objective: object, n_cells: int) -> Batch:
    """Read the first training batch, as the training loop would."""
    source = open_source(adata)
    cells = Loader(
        source,
        np.arange(source.n_obs),
        match(source.genes, model.vocab),
        model.encoder,
        model.vocab,
        n_cells,
        keep_whole=getattr(objective, "predicts_whole_cells", False),
    )
    return next(cells.epoch(0))[0]


def performers(cases: Cases) -> None:
    """Memory and time of a pretraining step of the Performers, whose cells have a token for every gene."""
    rate = gemm_rate_bf16(cases.scale.matrix, cases.device)
    for family, n_genes in (("scbert", 16_906), ("scfoundation", 19_264)):
        cases.measure(family, _performer, cases, family, n_genes if cases.scale.performers == "base" else 80, rate)


def _performer(cases: Cases, family: str, n_genes: int, rate: float) -> dict[str, Any]:
    torch.manual_seed(0)
    n_cells, device = cases.scale.performer_cells, torch.device(cases.device)
    cells = table(made_cells(n_cells, n_genes, n_genes // 10))
    model = models.build(family, vocab=cells.var_names, size=cases.scale.performers, dropout=0.0)
    objective = objective_from_dict(model.config.objective())
    batch = read_batch(model, cells, objective, n_cells).to(device)
    model.to(device)
    train_mode(model)
    optimise = optimizer(model, tl.TrainConfig(lr=1e-4))

    def step() -> None:
        with autocast("bf16", device):
            loss = objective(model, batch, 0)
        (loss.sum / loss.count).backward()
        optimise.step()
        optimise.zero_grad(set_to_none=True)

    flop = 3 * n_cells * model.forward_flops(len(batch.genes) / n_cells)
    return _timed(step, flop, batch, rate, 2)
