"""Row 8: a pretraining step of Geneformer, compared with BertForMaskedLM of transformers on padded cells."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor
from transformers import BertForMaskedLM

from benchmarks._cells import blood
from benchmarks._timing import Ratio, Row, gemm_rate, in_turns, one_torch_thread
from benchmarks.row06_pretraining import training_flop
from scllm import models
from scllm.data.genes import match
from scllm.data.source import open_source
from scllm.engine.config import TrainConfig
from scllm.engine.loader import Loader
from scllm.engine.objectives import MaskedGene
from scllm.engine.optim import optimizer, train_mode
from scllm.models.base import Batch, CellModel

N_CELLS, ROUNDS, TARGET = 8, 5, 2.0


class OurStep:
    """One optimiser step on one batch: masks, forward, backward, AdamW."""

    def __init__(self, model: CellModel, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.optimise = optimizer(model, TrainConfig(lr=1e-4))
        train_mode(model)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimise.step()
        self.optimise.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """Compute the mean loss over the masked genes."""
        loss = MaskedGene()(self.model, self.batch, 0)
        return loss.sum / loss.count


class TheirStep:
    """The same weights, masks and optimiser in transformers, on padded cells and with logits of every token."""

    def __init__(self, model: CellModel, batch: Batch) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder, format="geneformer")
            self.model = BertForMaskedLM.from_pretrained(folder).train()
        self.optimise = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        shown, at = MaskedGene().hide(batch, model.is_special, model.vocab.mask_id)
        self.ids, _, padding = shown.padded(pad_id=model.vocab.pad_id)
        self.mask = (~padding).long()
        labels = torch.full_like(batch.genes, -100).index_copy(0, at, batch.genes[at])
        self.labels, _, _ = batch.with_genes(labels).padded(pad_id=-100)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimise.step()
        self.optimise.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """Compute the mean loss over the masked genes."""
        return self.model(input_ids=self.ids, attention_mask=self.mask, labels=self.labels).loss


def batch_of(size: str) -> tuple[CellModel, Batch]:
    """Build a model of a published size, with as many tokens as published, and read a batch of blood cells."""
    source = open_source(blood())
    n_tokens = 25_426 if size.startswith("v1") else 20_275
    names = [*source.genes, *(f"other_{i}" for i in range(n_tokens - len(source.genes) - (2 if "v1" in size else 4)))]
    torch.manual_seed(0)
    model = models.build("geneformer", vocab=names, size=size, dropout=0.0)
    genes = match(source.genes, model.vocab)
    rows = torch.randperm(source.n_obs, generator=torch.Generator().manual_seed(0)).numpy()
    return model, next(Loader(source, rows, genes, model.encoder, model.vocab, N_CELLS).epoch(0))[0]


@one_torch_thread
def run() -> Row:
    model, batch = batch_of("v1-10m")
    fill = len(batch.genes) / (batch.n_cells * max(batch.lengths))
    ours, theirs = OurStep(model, batch), TheirStep(model, batch)
    expected = theirs.loss().item()
    assert abs(ours.loss().item() - expected) < 1e-4 * expected
    ours(), theirs()
    ratio = Ratio(*in_turns((ours, theirs), rounds=ROUNDS))
    seconds = sorted(ratio.ours)[ROUNDS // 2]
    return Row(
        number=8,
        what=f"pretraining step, Geneformer V1-10M, {batch.n_cells} blood cells of {min(batch.lengths)} to "
        f"{max(batch.lengths)} tokens (fill {fill:.2f}), fp32 on a CPU",
        beside="the same weights and masks in BertForMaskedLM of transformers, padded",
        ratio=str(ratio),
        absolute=f"{len(batch.genes) / seconds:,.0f} tokens per CPU-second",
        share_of_roof=f"{training_flop(model, batch.lengths) / seconds / gemm_rate():.0%} of GEMM, only the blocks",
        target=f">= {TARGET}x",
        is_met=ratio.median >= TARGET,
    )
