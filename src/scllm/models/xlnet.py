"""XLNet on ranked genes: predicts each gene from those before it in a random order (Yang et al. 2019).

In transformers' XLNet, every position sees itself unless ``perm_mask`` and ``target_mapping`` prevent it, so with
labels alone the network learns to copy. Here, genes are always predicted with both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from scllm.models.base import Batch
from scllm.models.entries import entry
from scllm.models.gene_lm import GeneLM, GeneLMConfig, Likelihood

__all__ = ["FINETUNE", "PRETRAIN", "SIZES", "Config", "Model"]

SIZES = {
    "tiny": {"n_layers": 2, "n_heads": 4, "d_model": 64},
    "small": {"n_layers": 4, "n_heads": 4, "d_model": 128},
    "base": {},
    "xlnet-base": {"n_layers": 12, "n_heads": 12, "d_model": 768},
}

PRETRAIN = {"epochs": 6, "batch_size": 32, "lr": 5e-4}
FINETUNE = {"epochs": 3, "batch_size": 32, "lr": 3e-5}


@dataclass(frozen=True)
class Config(GeneLMConfig):
    """Architecture of XLNet, with relative positions; the size ``"xlnet-base"`` is that of the published model."""

    takes: ClassVar[tuple[Likelihood, ...]] = ("permutation",)

    def architecture(self) -> dict[str, Any]:
        """Return XLNet's settings."""
        if self.hf_config is not None:
            return super().architecture()
        return {
            "model_type": "xlnet",
            "n_layer": self.n_layers,
            "n_head": self.n_heads,
            "d_model": self.d_model,
            "d_inner": self.d_hidden,
            "dropout": self.dropout,
            "use_mems_eval": False,
            "use_mems_train": False,
        }


class Model(GeneLM):
    """XLNet: post-norm blocks with relative positions and a second stream of states that know only their position.

    Embeddings come from the first stream, in which all genes of a cell see each other. Adapters (``lora``) are put into
    the feed-forward layers only, because the attention's weights are not linear layers.
    """

    family = "xlnet"

    @entry
    def permuted_logits(self, batch: Batch, order: Tensor, at: Tensor) -> Tensor:
        """Compute logits of the tokens at positions ``at``, ``(n, n_tokens)``, each only from tokens of lower order.

        Parameters
        ----------
        batch
            The cells.
        order
            Order of each token, ``(t,)``; tokens with the same number do not see each other.
        at
            Positions to predict.
        """
        genes, _, padding = batch.padded(pad_id=self.pad_id)
        turn = order.new_full(genes.shape, int(order.max()) + 1 if len(order) else 0)
        turn[~padding] = order
        wanted = torch.zeros_like(batch.genes, dtype=torch.bool).index_fill(0, at, True)
        asked = torch.zeros_like(padding)
        asked[~padding] = wanted
        # every cell gets as many targets as the cell with most; surplus targets are dropped afterwards
        n_asked = asked.sum(1)
        most = int(n_asked.max()) if len(n_asked) else 1
        place = torch.argsort((~asked).to(torch.uint8), dim=1, stable=True)[:, :most]
        dtype = self.network.dtype
        states = self._states(
            genes,
            padding,
            perm_mask=self._unseen(turn).to(dtype),
            target_mapping=torch.nn.functional.one_hot(place, genes.shape[1]).to(dtype),
        )
        there = torch.arange(place.shape[1], device=place.device) < n_asked[:, None]
        # targets are returned by position, while `at` may be in any order
        found = self.network.get_output_embeddings()(states[there])
        return found[wanted.cumsum(0)[at] - 1]

    def _unseen(self, turn: Tensor) -> Tensor:
        """Return which tokens each token must not see, ``(b, l, l)``: itself and all that are not before it."""
        return turn[:, None, :] >= turn[:, :, None]

    def gene_logits(self, batch: Batch, at: Tensor) -> Tensor:
        """Compute logits of the tokens at positions ``at``, ``(n, n_tokens)``, from all other tokens."""
        return self.permuted_logits(batch, torch.zeros_like(batch.genes).index_fill(0, at, 1), at)
