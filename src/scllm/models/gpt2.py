"""GPT-2 on ranked genes: predicts each gene from those expressed more highly (Radford et al. 2019).

``build("gpt2", hf_config=...)`` makes any other causal or masked language model of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from scllm.models.gene_lm import GeneLM, GeneLMConfig, Likelihood

__all__ = ["FINETUNE", "PRETRAIN", "SIZES", "Config", "Model"]

SIZES = {
    "tiny": {"n_layers": 2, "n_heads": 4, "d_model": 64},
    "small": {"n_layers": 4, "n_heads": 4, "d_model": 128},
    "base": {},
    "gpt2": {"n_layers": 12, "n_heads": 12, "d_model": 768},
}

PRETRAIN = {"epochs": 6, "batch_size": 32, "lr": 5e-4}
FINETUNE = {"epochs": 3, "batch_size": 32, "lr": 3e-5}


@dataclass(frozen=True)
class Config(GeneLMConfig):
    """Architecture of GPT-2; the size ``"gpt2"`` is that of the published small model."""

    takes: ClassVar[tuple[Likelihood, ...]] = ("causal", "pseudo")

    def architecture(self) -> dict[str, Any]:
        """Return GPT-2's settings, without dropout of attention weights, which fused kernels do not have."""
        if self.hf_config is not None:
            return super().architecture()
        return {
            "model_type": "gpt2",
            "n_layer": self.n_layers,
            "n_head": self.n_heads,
            "n_embd": self.d_model,
            "n_inner": self.d_hidden,
            "n_positions": self.max_len,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "attn_pdrop": 0.0,
            "activation_function": "gelu_pytorch_tanh",
        }


class Model(GeneLM):
    """GPT-2: causal pre-norm blocks, learned positions, output tied to the gene table."""

    family = "gpt2"
    poolings = ("mean", "ranked", "linear", "max")  # the first token sees nothing of the cell
