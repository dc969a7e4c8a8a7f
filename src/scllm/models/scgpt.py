"""scGPT: a transformer on binned expression (Cui et al., Nature Methods 2024, doi:10.1038/s41592-024-02201-0)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scllm.data.encode import Encoder
from scllm.data.vocab import Vocab
from scllm.models.base import Batch, CellModel, Outputs
from scllm.models.config import Recipe
from scllm.models.entries import entry
from scllm.models.layers import BinTable, Block, CellToGenes, ClassHead, GradientReversal, ValueNetwork, mlp
from scllm.models.scgpt_config import Config
from scllm.models.scgpt_files import read, write
from scllm.models.scgpt_perturbation import perturbation_parts, predict_perturbed

__all__ = ["FINETUNE", "PRETRAIN", "RECIPES", "SIZES", "Config", "Model", "read"]

SIZES = {
    "tiny": {"n_layers": 2, "n_heads": 4, "d_model": 64, "d_hidden": 64},
    "small": {"n_layers": 4, "n_heads": 4, "d_model": 128, "d_hidden": 256},
    "base": {},
}

# settings of scGPT-style pretraining on 300,000 blood cells
# (squared errors of bins begin near 2,000, so the relational term has a large weight)
PRETRAIN = {"epochs": 6, "batch_size": 32, "lr": 1e-4, "relational_weight": 4_000.0}
# new models: the relational term and the pooled skip, chosen on two data sets with "tiny" (docs/study.md)
_SHORT = {"relational": True, "batch_size": 64, "schedule": "cosine", "warmup": 20, "max_len": 256}
RECIPES = {
    "tiny": Recipe(model={"pooled_skip": True, "dropout": 0.0}, training={**_SHORT, "lr": 3e-3}, n_steps=500),
    "small": Recipe(model={"pooled_skip": True, "dropout": 0.0}, training={**_SHORT, "lr": 1e-3}, n_steps=500),
    "base": Recipe(model={"pooled_skip": True}, training={"relational": True}),
}
# the head is fitted beforehand (engine/head_start.py), and higher learning rates would first undo that
FINETUNE = {"epochs": 3, "batch_size": 32, "lr": 3e-5}


class Model(CellModel):
    """scGPT: gene embedding + value embedding, ``<cls>`` first, post-norm blocks without positions."""

    family = "scgpt"
    unit_length = True
    head_pooling = "ranked"

    # only in models that predict perturbations
    flag_embedding: nn.Embedding
    coefficients: nn.ModuleList
    offsets: nn.ModuleList
    covariate_embedding: nn.Sequential

    def __init__(self, config: Config, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        self.config: Config = config
        d = config.d_model
        self.gene_embedding = nn.Embedding(len(vocab), d)
        self.gene_norm = nn.LayerNorm(d)
        if config.value_style == "continuous":
            self.value_embedding: nn.Module = ValueNetwork(d, config.dropout)
        elif config.value_style == "category":
            self.value_embedding = BinTable(config.n_value_bins, d)
        if config.batch_labels:
            self.batch_embedding = nn.Sequential(nn.Embedding(config.n_batches, d), nn.LayerNorm(d))
        if config.domain_norm:
            # the original's batch norms have no weights
            self.domain_norms = nn.ModuleList(
                nn.BatchNorm1d(d, eps=6.1e-5, affine=False) for _ in range(config.n_batches)
            )
        if config.pooled_skip:
            self.pooled_norm = nn.LayerNorm(d)
        self.layers = nn.ModuleList(
            Block(d, heads, hidden, config.dropout, d_head=d // config.n_heads)
            for heads, hidden in config.block_sizes()
        )
        d_seen = 2 * d if config.batch_labels else d
        self.decoder = None if config.perturbed else mlp(d_seen, d)
        for name, part in perturbation_parts(config).items():
            self.add_module(name, part)
        if config.n_covariates:
            self.register_buffer("covariates", torch.zeros(len(config.perturbed), config.n_covariates))
        self.zero_decoder = mlp(d_seen, d) if config.explicit_zero_prob else None
        self.cell_decoder = None
        if config.cell_decoder is not None:
            self.cell_decoder = CellToGenes(config.cell_decoder, d, d_seen, config.explicit_zero_prob)
        self.batch_head = ClassHead(d, config.n_batches, 3, nn.LeakyReLU) if config.adversarial else None
        self._initialise()

    def _initialise(self) -> None:
        # as in the original: a narrow uniform table, PyTorch's defaults elsewhere
        nn.init.uniform_(self.gene_embedding.weight, -0.1, 0.1)

    @property
    def blocks(self) -> Sequence[Any]:
        """Transformer blocks, first to last."""
        return list(self.layers)

    def gene_table(self) -> Tensor:
        """Return the embedding of each token before the norm, ``(n_tokens, d)``."""
        return self.gene_embedding.weight

    def new_head(self, n_outputs: int) -> nn.Module:
        """Make a classifier like that of the original."""
        return ClassHead(self.config.d_model, n_outputs, self.config.class_layers, nn.ReLU)

    def embed_genes(self, genes: Tensor) -> Tensor:
        """Embed genes as the blocks read them, any shape to ``(..., d)``."""
        return self.gene_norm(self.gene_embedding(genes))

    def inputs(self, batch: Batch) -> Tensor:
        """Compute the input embeddings of the first block, ``(t, d)``."""
        genes = self.embed_genes(batch.genes)
        if batch.values is None:
            raise ValueError("Expected a value for each gene, but this batch has none. Encode with a BinEncoder.")
        if self.config.value_style == "scaling":
            x = genes * batch.values[:, None].to(genes.dtype)
        else:
            x = genes + self.value_embedding(batch.values)
        if self.config.pooled_skip:
            x = x.index_add(0, batch.first, self._pooled(genes, batch).to(x.dtype))
        return self._normalise_domains(x, batch) if self.config.domain_norm else x

    def _pooled(self, genes: Tensor, batch: Batch) -> Tensor:
        """Compute the normalised mean of each cell's gene embeddings, weighted by the values shown, ``(b, d)``."""
        assert batch.values is not None
        shown = self.is_expressed(batch) & (batch.values != self.config.mask_value)
        weight = batch.values.float() * shown
        total = torch.zeros(batch.n_cells, genes.shape[1], device=genes.device)
        total = total.index_add(0, batch.cell, genes.float() * weight[:, None])
        sums = torch.zeros_like(total[:, 0]).index_add(0, batch.cell, weight)
        return self.pooled_norm(total / sums.clamp(min=1e-6)[:, None])

    def forward(self, batch: Batch) -> Outputs:
        """Compute predictions for every token and every cell."""
        hidden = self.hidden(batch)
        cell = hidden[batch.first]
        heads = self.decode_cell(cell, batch.genes, batch.cell, batch)
        if self.decoder is not None:
            heads |= self.decode(hidden, batch.cell, batch)
        if self.batch_head is not None:
            heads["batch"] = self.batch_head(GradientReversal.apply(cell))
        return Outputs(hidden, cell, heads | self.head_outputs_after(hidden, batch))

    @entry
    def decode(self, hidden: Tensor, cell_of: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Predict ``value`` and ``zero`` logits from hidden states of tokens ``(n, d)`` of the cells ``cell_of``."""
        if self.config.batch_labels:
            hidden = torch.cat([hidden, self.batch_embedding(batch.experiment)[cell_of]], dim=1)
        if self.decoder is None:
            raise ValueError(
                "This scgpt model predicts expression after perturbations only. Use tl.predict_perturbation, or the "
                "model that it was trained from."
            )
        predicted = {"value": self.decoder(hidden).squeeze(1)}
        if self.zero_decoder is not None:
            predicted["zero"] = self.zero_decoder(hidden).squeeze(1)
        return predicted

    @entry
    def decode_cell(self, cell: Tensor, genes: Tensor, cell_of: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Predict values of ``genes`` ``(n,)`` from the embeddings of the cells ``cell_of``."""
        if self.cell_decoder is None:
            return {}
        if self.config.batch_labels:
            cell = torch.cat([cell, self.batch_embedding(batch.experiment)], dim=1)
        return self.cell_decoder(cell, self.embed_genes(genes), cell_of)

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Predict values of the tokens ``at``, ``(n,)``; with ``hide``, these are masked in the input."""
        if hide:
            assert batch.values is not None
            batch = batch.with_values(batch.values.index_fill(0, at, self.config.mask_value))
        return self.decode(self.hidden(batch)[at], batch.cell[at], batch)["value"]

    def reconstruct_genes(self, batch: Batch, genes: Tensor) -> Tensor:
        """Predict values of chosen genes from the cell embedding, ``(b, g)``."""
        cell_of = torch.arange(batch.n_cells, device=genes.device).repeat_interleave(len(genes))
        cell = self.embed(batch, pooling=self.pooling)
        predicted = self.decode_cell(cell, genes.repeat(batch.n_cells), cell_of, batch)
        if "cell_value" not in predicted:
            return super().reconstruct_genes(batch, genes)
        return predicted["cell_value"].view(batch.n_cells, -1)

    @entry
    def predict_perturbed(self, batch: Batch, flags: Tensor, covariate: Tensor | None = None) -> Tensor:
        """Predict the value of each token after a perturbation with each decoder, ``(n_decoders, t)``.

        Parameters
        ----------
        batch
            Cells before the perturbation.
        flags
            1 for tokens of perturbed genes and 0 for others, ``(t,)``.
        covariate
            Vector of the compound and its dose of each cell, ``(b, n_covariates)``; NaN for cells without one.
        """
        return predict_perturbed(self, batch, flags, covariate)

    def value_losses(self, from_cell: bool) -> tuple[str, ...]:
        """Return the names of the losses that :class:`scllm.engine.objectives.MaskedValue` computes."""
        names = ["mse"] + ["zero"] * self.config.explicit_zero_prob
        if from_cell and self.cell_decoder is not None:
            names += ["mse_cell"] + ["zero_cell"] * self.config.explicit_zero_prob
        return tuple(names)

    def _normalise_domains(self, x: Tensor, batch: Batch) -> Tensor:
        """Normalise each experimental batch by its own statistics; a mini-batch may hold cells of several."""
        domain = batch.experiment[batch.cell]
        normalised = torch.empty_like(x)
        for label in domain.unique().tolist():
            of_label = domain == label
            normalised[of_label] = self.domain_norms[label](x[of_label])
        return normalised

    def write_original(self, path: Path) -> None:
        """Write ``args.json``, ``vocab.json`` and ``best_model.pt`` as the scGPT package reads them."""
        write(self, path)
