"""ALBERT on ranked genes: predicts masked genes from all others, with one block for all layers (Lan et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scllm.models.gene_lm import GeneLM, GeneLMConfig, Likelihood

__all__ = ["FINETUNE", "PRETRAIN", "SIZES", "Config", "Model"]

SIZES = {
    "tiny": {"n_layers": 2, "n_heads": 4, "d_model": 64, "d_embedding": 32},
    "small": {"n_layers": 4, "n_heads": 4, "d_model": 128, "d_embedding": 64},
    "base": {},
    "albert-base": {"n_layers": 12, "n_heads": 12, "d_model": 768},
}

PRETRAIN = {"epochs": 6, "batch_size": 32, "lr": 5e-4}
FINETUNE = {"epochs": 3, "batch_size": 32, "lr": 3e-5}


@dataclass(frozen=True)
class Config(GeneLMConfig):
    """Architecture of ALBERT; the size ``"albert-base"`` is that of the published model.

    All layers share the weights of one block, so ``freeze=1`` freezes all of them, and ``layer_decay`` has one step.

    Parameters
    ----------
    d_embedding
        Width of the gene table, which one matrix maps to ``d_model``, so that many genes need few weights.
    """

    d_embedding: int = 128

    takes: ClassVar[tuple[Likelihood, ...]] = ("pseudo",)

    def architecture(self) -> dict[str, Any]:
        """Return ALBERT's settings, without dropout of attention weights, which fused kernels do not have."""
        if self.hf_config is not None:
            return super().architecture()
        return {
            "model_type": "albert",
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_hidden,
            "embedding_size": self.d_embedding,
            "max_position_embeddings": self.max_len,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
        }


class Model(GeneLM):
    """ALBERT: one post-norm block applied repeatedly, learned positions, a factorised gene table."""

    family = "albert"
