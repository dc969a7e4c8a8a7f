"""What GPT-2, ALBERT and XLNet over gene sentences share: a language model of transformers on packed cells.

A sentence is ``<cls>`` and the cell's genes by falling expression, one token a gene. ``<cls>`` stands first in every
family: it is what the first gene is predicted from, and what a cell without genes consists of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scllm._log import quiet_imports
from scllm.data.encode import Encoder, RankEncoder
from scllm.data.vocab import Vocab
from scllm.models.base import Batch, CellModel, ModelConfig, Outputs
from scllm.models.int8 import has_plain_weights
from scllm.models.layers import linear_cross_entropy
from scllm.models.pruning import shrink

__all__ = ["GeneLM", "Likelihood", "SentenceConfig"]

Likelihood = Literal["causal", "pseudo", "permutation"]

# what makes transformers fetch code: a file that says so is not followed
_FETCHES = ("auto_map", "attn_implementation", "_attn_implementation", "quantization_config")
# names that dropout goes by
_DROPOUT = ("resid_pdrop", "hidden_dropout_prob", "hidden_dropout", "dropout")

_OBJECTIVES: dict[Likelihood, dict[str, Any]] = {
    "causal": {"kind": "NextGene"},
    "pseudo": {"kind": "MaskedGene"},
    "permutation": {"kind": "PermutedGene"},
}


@dataclass(frozen=True)
class SentenceConfig(ModelConfig):
    """The architecture of a gene language model.

    Parameters
    ----------
    max_len
        Longest sentence, ``<cls>`` included; also the number of positions, where a network has a table of them.
    hf_config
        A configuration of transformers (or its dictionary) in place of the family's own network. Layers, heads,
        width and dropout are then its own; the size of the vocabulary is always ours.
    d_hidden
        Width of the feed-forward layers; ``None`` is four times ``d_model``.
    """

    max_len: int = 1024
    hf_config: Mapping[str, Any] | None = None
    d_hidden: int | None = None

    takes: ClassVar[tuple[Likelihood, ...]] = ()
    """Kinds of network that the family takes; the first is its own."""

    def __post_init__(self) -> None:
        if self.hf_config is not None:
            given = self.hf_config
            plain = given if isinstance(given, Mapping) else json.loads(given.to_json_string(use_diff=False))
            config = network_config(plain)
            theirs = {"n_layers": config.num_hidden_layers, "d_model": config.hidden_size, "hf_config": dict(plain)}
            theirs["n_heads"] = getattr(config, "num_attention_heads", 1)  # recurrent networks have none
            theirs["dropout"] = next((getattr(config, name) for name in _DROPOUT if hasattr(config, name)), 0.0)
            for name, value in theirs.items():
                object.__setattr__(self, name, value)
        super().__post_init__()
        if self.d_hidden is None:
            object.__setattr__(self, "d_hidden", 4 * self.d_model)
        if self.likelihood not in self.takes:
            raise ValueError(
                f"hf_config is a {self.architecture()['model_type']!r} network, whose likelihood is "
                f"{self.likelihood!r}; {self.takes} expected of this family. XLNet goes with 'xlnet', all others with "
                "'gpt2'."
            )

    def architecture(self) -> dict[str, Any]:
        """Settings of the network as transformers names them, ``model_type`` among them."""
        return dict(self.hf_config or {})

    @property
    def likelihood(self) -> Likelihood:
        """How the network says how likely a sentence is."""
        return self.takes[0] if self.hf_config is None else _likelihood(self.hf_config)

    def objective(self) -> dict[str, Any]:
        """What the network is pretrained for by default."""
        return dict(_OBJECTIVES[self.likelihood])

    def encoder(self) -> Encoder:
        """Genes by falling counts, behind ``<cls>``."""
        limit = _n_positions(network_config(self.hf_config)) if self.hf_config is not None else None
        return RankEncoder(max_len=min(self.max_len, limit or self.max_len), cls=True)

    def vocab(self, genes: Any) -> Vocab:
        """Genes, ``<cls>`` and ``<pad>``; ``<mask>`` only for networks that are trained with it."""
        full = Vocab.from_genes(genes)
        return full if self.likelihood == "pseudo" else Vocab(full.tokens[:-1], mask=None)


class GeneLM(CellModel):
    """A language model of transformers over gene sentences.

    The cell embedding is the mean over its genes: ``<cls>`` is trained for nothing, and in a causal network sees
    nothing of the cell.
    """

    pooling = "mean"
    head_pooling = "ranked"

    def __init__(self, config: SentenceConfig, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        self.config: SentenceConfig = config
        self.likelihood: Likelihood = config.likelihood
        if not isinstance(encoder, RankEncoder) or not encoder.cls:
            raise ValueError(
                f"the encoder is {encoder!r}, a RankEncoder(cls=True) expected: {self.family} reads genes in the order "
                "of their expression, and predicts the first from `<cls>`. Leave encoder= out, or pass such a one."
            )
        self.pad_id = vocab.pad_id
        self.network: Any = _network(config, len(vocab))
        limit = _n_positions(self.network.config)
        if limit is not None and encoder.max_len > limit:
            raise ValueError(
                f"the encoder makes sentences of up to {encoder.max_len} tokens, at most {limit} expected: the network "
                "has no further positions. Pass max_len= to the model, or an encoder with a smaller one."
            )
        if config.block_heads is not None:
            for block, (n_heads, hidden) in zip(self.prunable()["block"], config.block_sizes(), strict=True):
                shrink(block, (torch.arange(n_heads), torch.arange(hidden)))
        self.tied: dict[str, str] = {}
        """Weights that stand under two names, which are stored once."""
        self.layers_changed()
        self.head_name = self._checked()

    def layers_changed(self) -> None:
        """Find again which weights stand under two names."""
        first: dict[int, str] = {}
        weights = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        self.tied = {name: first[id(w)] for name, w in weights if first.setdefault(id(w), name) != name}

    def prunable(self) -> dict[str, Sequence[Any]]:
        """The network's blocks; ALBERT's lie in groups."""
        within = [module for block in self.blocks for module in block.modules()]
        return {"block": [layer for layer in within if type(layer).__name__ == "AlbertLayer"] or self.blocks}

    def _checked(self) -> str | None:
        """The module that alone makes logits of states, if there is one; an error where a network sees too much.

        Tried out on two sentences that differ in their last token, and on what is left of them without it.
        """
        n_tokens = len(self.vocab)
        tokens = torch.arange(4).repeat(2, 1) % n_tokens
        tokens[1, -1] = (tokens[0, -1] + 1) % n_tokens
        shown = torch.zeros_like(tokens, dtype=torch.bool)
        last = torch.arange(4).expand(2, 4) == 3
        name, network = self._only_head(), self.network
        was_training = network.training
        with torch.no_grad():
            network.eval()
            states, padded = self._states(tokens, shown), self._states(tokens, last)
            shorter = self._states(tokens[:, :3], shown[:, :3])
            logits = network(input_ids=tokens, **self._positions(tokens)).logits
            # to the bit: what is capped differs little as long as weights are small
            alone = name is not None and torch.equal(getattr(network, name)(states), logits)
            network.train(was_training)
        scale = states.abs().max()
        if self.likelihood == "causal" and not torch.allclose(states[0, :3] / scale, states[1, :3] / scale, atol=1e-6):
            raise ValueError(
                f"the {network.config.model_type!r} network sees genes that come later, one that looks back only "
                "expected: it would copy the gene it is to predict. Pass the configuration of a causal language model."
            )
        if not torch.allclose(padded[:, :3] / scale, shorter / scale, atol=1e-5):
            raise ValueError(
                f"the {network.config.model_type!r} network sees padding, one that heeds the attention mask expected: "
                "its states would depend on the other cells of a batch. Pass another configuration."
            )
        return name if alone else None

    def _only_head(self) -> str | None:
        others = [name for name, _ in self.network.named_children() if name != self.network.base_model_prefix]
        return others[0] if len(others) == 1 else None

    @property
    def blocks(self) -> Sequence[Any]:
        """The network's blocks, first to last; ALBERT has one, which all its layers share."""
        lists = [module for module in self.network.base_model.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise ValueError(
                f"the {self.network.config.model_type!r} network has no list of blocks, one expected. Freeze by name "
                "patterns instead, pass head_reads='last', and leave layer_decay and lora out."
            )
        return list(lists[0])

    def _states(self, genes: Tensor, padding: Tensor, layer: int = -1, **more: Tensor) -> Tensor:
        """States after a block of padded sentences, ``(b, l, d)``."""
        inner = layer != -1
        found = self._through(self.network.base_model, genes, padding, output_hidden_states=inner, **more)
        return (found.hidden_states[layer] if inner else found.last_hidden_state)[: len(genes)]

    def _through(self, network: Any, genes: Tensor, padding: Tensor, **more: Any) -> Any:
        """What a network makes of padded sentences; where there are none, of one that the caller leaves out again."""
        if not len(genes):
            # transformers cannot reshape what is empty, and a rank without cells takes part in the backward pass
            genes, padding = _one_cell(genes), _one_cell(padding)
            more = {name: _one_cell(value) if isinstance(value, Tensor) else value for name, value in more.items()}
        return network(input_ids=genes, attention_mask=(~padding).long(), **self._positions(genes), **more)

    def _positions(self, genes: Tensor) -> dict[str, Tensor]:
        # RoBERTa counts positions from the padding token's id on, unless it is told
        if "position_ids" not in signature(self.network.base_model.forward).parameters:
            return {}
        return {"position_ids": torch.arange(genes.shape[1], device=genes.device).expand(genes.shape)}

    def hidden(self, batch: Batch, *, layer: int = -1, first_only: bool = False) -> Tensor:
        """States of all tokens after a block, ``(t, d)``; with ``first_only`` of each cell's first one, ``(b, d)``."""
        genes, _, padding = batch.padded(pad_id=self.pad_id)
        states = self._states(genes, padding, layer)
        return states[:, 0] if first_only else states[~padding]

    def first_and_last(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of all tokens before the first and after the last block, ``(t, d)`` each."""
        genes, _, padding = batch.padded(pad_id=self.pad_id)
        read: list[Tensor] = []
        # `output_hidden_states` would keep the states after every block for the sake of one
        watch = self.blocks[0].register_forward_pre_hook(lambda _block, states: read.append(states[0]))
        try:
            last = self._states(genes, padding)
        finally:
            watch.remove()
        # XLNet's blocks read positions by cells; ALBERT's one block is called for every layer
        first = read[0].transpose(0, 1) if self.network.config.model_type == "xlnet" else read[0]
        return first[: len(genes)][~padding], last[~padding]

    def inputs(self, batch: Batch) -> Tensor:
        """What the first block reads, ``(t, d)``."""
        return self.hidden(batch, layer=-self.config.n_layers - 1)

    def forward(self, batch: Batch) -> Outputs:
        """States, cell embeddings and what the heads make of them."""
        hidden = self.hidden(batch)
        cell = self.pool(hidden, batch, self.pooling)
        return Outputs(hidden, cell, self.head_outputs_after(hidden, batch))

    def gene_table(self) -> Tensor:
        """The embedding of each token, ``(n_tokens, d)``; in ALBERT of its own, smaller width."""
        return self.network.get_input_embeddings().weight

    def gene_logits(self, batch: Batch, at: Tensor) -> Tensor:
        """Logits of the tokens at positions ``at``, ``(n, n_tokens)``.

        A causal network has seen the genes before each position, a masked one all that the batch shows.
        """
        at = at - 1 if self.likelihood == "causal" else at
        if self.head_name is not None:
            return getattr(self.network, self.head_name)(self.hidden(batch)[at])
        genes, _, padding = batch.padded(pad_id=self.pad_id)
        return self._through(self.network, genes, padding).logits[: len(genes)][~padding][at]

    def gene_loss(self, batch: Batch, at: Tensor, genes: Tensor) -> Tensor:
        """Summed cross-entropy (nats) of ``genes`` ``(n,)`` at positions ``at``, from what the network may see."""
        head = None if self.head_name is None else getattr(self.network, self.head_name)
        if self.likelihood != "causal" or head is None or not has_plain_weights(head):
            return super().gene_loss(batch, at, genes)
        return linear_cross_entropy(self.hidden(batch)[at - 1], head.weight, head.bias, genes)

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Probability of each gene in its place, ``(n,)``: causal from the genes before, else from all others.

        With ``hide`` a masked network is shown none of ``at``; without, it sees the very gene.
        """
        shown = batch
        if hide and self.likelihood == "pseudo":
            shown = replace(batch, genes=batch.genes.index_fill(0, at, self.vocab.mask_id))
        likely = self.gene_logits(shown, at).float().softmax(1)
        return likely.gather(1, batch.genes[at, None]).squeeze(1)

    def speed_up(self, *, compile: bool = False, checkpointing: bool = False) -> None:
        """Compile the blocks, or compute them again in the backward pass for less memory."""
        for block in self.blocks:
            block.__class__ = _faster(type(block), compile, checkpointing)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights, tied ones once."""
        weights = super().state_dict(*args, **kwargs)
        for name in self.tied:
            weights.pop(name, None)
        return weights

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take weights that :meth:`state_dict` gave."""
        also = {name: state_dict[first] for name, first in self.tied.items() if first in state_dict}
        return super().load_state_dict({**state_dict, **also}, *args, **kwargs)


def _faster(kind: type[nn.Module], compile: bool, checkpointing: bool) -> type[nn.Module]:
    """A block's class with another forward pass; one bound to the block would keep it alive until a collection."""
    inner = torch.compile(kind.forward, dynamic=True) if compile else kind.forward

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not checkpointing:
            return inner(block, *args, **kwargs)
        return checkpoint(inner, block, *args, use_reentrant=False, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


def _one_cell(none: Tensor) -> Tensor:
    return none.new_zeros(1, *none.shape[1:])


def network_config(settings: Mapping[str, Any]) -> Any:
    """The configuration of transformers that a dictionary describes."""
    with quiet_imports():
        from transformers import AutoConfig  # takes seconds

    plain = {name: value for name, value in settings.items() if name not in (*_FETCHES, "model_type")}
    return AutoConfig.for_model(settings["model_type"], **plain)


def _likelihood(settings: Mapping[str, Any]) -> Likelihood:
    """How a network of transformers says how likely a sentence is."""
    with quiet_imports():
        from transformers.models.auto import modeling_auto as auto

    kind = settings["model_type"]
    if kind == "xlnet":
        return "permutation"
    if not settings.get("is_encoder_decoder"):
        # BERT and its like are there as decoders too, which look back only
        if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not settings.get("is_decoder"):
            return "pseudo"
        if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "causal"
    raise ValueError(
        f"hf_config is of type {kind!r}, a causal or masked language model of transformers expected. Pass, for "
        "example, a LlamaConfig or a BertConfig."
    )


def _network(config: SentenceConfig, n_tokens: int) -> nn.Module:
    """Fresh weights for our vocabulary."""
    with quiet_imports():
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
        from transformers.pytorch_utils import Conv1D

    # padding is left out by the attention mask alone: a padding token of theirs would shift RoBERTa's positions
    own = {"vocab_size": n_tokens, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    kind = AutoModelForMaskedLM if config.likelihood == "pseudo" else AutoModelForCausalLM
    settings = network_config({**config.architecture(), **own})
    with quiet_imports():  # of the module of the network
        network = kind.from_config(settings, trust_remote_code=False, dtype=torch.float32)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                setattr(module, name, _linear(child))
    return network


def _linear(transposed: Any) -> nn.Linear:
    """GPT-2's transposed linear layer as a plain one, which adapters and int8 know."""
    linear = nn.Linear(*transposed.weight.shape)
    with torch.no_grad():
        linear.weight.copy_(transposed.weight.T)
        linear.bias.copy_(transposed.bias)
    return linear


def _n_positions(config: Any) -> int | None:
    """Longest sentence a network has positions for; ``None`` where there is no table of them."""
    most = getattr(config, "max_position_embeddings", None)
    return most if most and most > 0 else None
