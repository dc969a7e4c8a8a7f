"""Common part of GPT-2, ALBERT and XLNet on genes: a language model of transformers on packed cells.

The token sequence of a cell is ``<cls>`` and its genes by decreasing expression, one token per gene. The first gene is
predicted from ``<cls>``, and a cell without genes consists only of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scllm._log import quiet_imports
from scllm.data.encode import Encoder, RankEncoder
from scllm.data.vocab import Vocab
from scllm.models.base import Batch, CellModel, ModelConfig, Outputs
from scllm.models.entries import entry
from scllm.models.hf_layers import attention_matrices, layer_parts, prunable_layers
from scllm.models.int8 import has_plain_weights
from scllm.models.layers import linear_cross_entropy
from scllm.models.places import places
from scllm.models.pruning import BlockParts, shrink

__all__ = ["GeneLM", "Likelihood", "GeneLMConfig"]

Likelihood = Literal["causal", "pseudo", "permutation"]

# settings that make transformers download code; they are ignored
_FETCHES = ("auto_map", "attn_implementation", "_attn_implementation", "quantization_config")
# names of the dropout setting in transformers
_DROPOUT = ("resid_pdrop", "hidden_dropout_prob", "hidden_dropout", "dropout")

_OBJECTIVES: dict[Likelihood, dict[str, Any]] = {
    "causal": {"kind": "NextGene"},
    "pseudo": {"kind": "MaskedGene"},
    "permutation": {"kind": "PermutedGene"},
}


@dataclass(frozen=True)
class GeneLMConfig(ModelConfig):
    """Architecture of a gene language model.

    Parameters
    ----------
    max_len
        Longest token sequence, including ``<cls>``; also the number of positions of networks with learned positions.
    hf_config
        A configuration of transformers (or its dictionary) that replaces the family's own network. It sets layers,
        heads, width and dropout, but not the vocabulary size, which is set from the genes.
    d_hidden
        Width of the feed-forward layers; ``None``: four times ``d_model``.
    """

    max_len: int = 1024
    hf_config: Mapping[str, Any] | None = None
    d_hidden: int | None = None

    takes: ClassVar[tuple[Likelihood, ...]] = ()
    """Kinds of likelihood that the family accepts; the first is that of its own network."""

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
                f"Expected hf_config of a network with a likelihood in {self.takes} for this family, got a "
                f"{self.architecture()['model_type']!r} network, whose likelihood is {self.likelihood!r}. Use the "
                "family 'xlnet' for XLNet and 'gpt2' for all others."
            )

    def architecture(self) -> dict[str, Any]:
        """Return settings of the network under the names of transformers, including ``model_type``."""
        return dict(self.hf_config or {})

    @property
    def likelihood(self) -> Likelihood:
        """Kind of likelihood of the network."""
        return self.takes[0] if self.hf_config is None else _likelihood(self.hf_config)

    def objective(self) -> dict[str, Any]:
        """Return the default pretraining objective."""
        return dict(_OBJECTIVES[self.likelihood])

    def encoder(self) -> Encoder:
        """Return the default encoder: ``<cls>``, then genes by decreasing counts."""
        limit = _n_positions(network_config(self.hf_config)) if self.hf_config is not None else None
        return RankEncoder(max_len=min(self.max_len, limit or self.max_len), cls=True)

    def vocab(self, genes: Any) -> Vocab:
        """Make a vocabulary of genes, ``<cls>`` and ``<pad>``; ``<mask>`` only for networks trained with it."""
        full = Vocab.from_genes(genes)
        return full if self.likelihood == "pseudo" else Vocab(full.tokens[:-1], mask=None)


class GeneLM(CellModel):
    """A language model of transformers on genes.

    The cell embedding is the mean over genes, because ``<cls>`` is not trained, and in a causal network it sees
    nothing of the cell.
    """

    pooling = "mean"
    head_pooling = "ranked"

    def __init__(self, config: GeneLMConfig, vocab: Vocab, encoder: Encoder) -> None:
        super().__init__(config, vocab, encoder)
        self.config: GeneLMConfig = config
        self.likelihood: Likelihood = config.likelihood
        if not isinstance(encoder, RankEncoder) or not encoder.cls:
            raise ValueError(
                f"Expected a RankEncoder(cls=True), because {self.family} reads genes in the order of their expression "
                f"and predicts the first from `<cls>`, got {encoder!r}. Leave encoder= out, or pass a RankEncoder."
            )
        self.pad_id = vocab.pad_id
        self.network: Any = _network(config, len(vocab))
        limit = _n_positions(self.network.config)
        if limit is not None and encoder.max_len > limit:
            raise ValueError(
                f"Expected an encoder with max_len of at most {limit}, the number of positions of the network, got "
                f"{encoder.max_len}. Pass a larger max_len= to the model, or an encoder with a smaller one."
            )
        if config.block_heads is not None:
            for parts, (n_heads, hidden) in zip(self.prunable()["block"], config.block_sizes(), strict=True):
                shrink(parts, (torch.arange(n_heads), torch.arange(hidden)))
        self.tied: dict[str, str] = {}
        """Weights that have two names and are stored once."""
        self.layers_changed()
        self.head_name = self._checked()

    def layers_changed(self) -> None:
        """Find which weights have two names."""
        first: dict[int, str] = {}
        weights = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        self.tied = {name: first[id(w)] for name, w in weights if first.setdefault(id(w), name) != name}

    def prunable(self) -> dict[str, list[BlockParts]]:
        """Return what can be removed of the network's layers."""
        return {"block": [layer_parts(layer) for layer in prunable_layers(self.blocks)]}

    def matrices(self) -> list[tuple[nn.Module, dict[str, tuple[int, ...]]]]:
        """Return the attention of XLNet, whose weights are no linear layers."""
        return attention_matrices(self.network)

    def _checked(self) -> str | None:
        """Return the module that maps states to logits, if there is one; raise if a network sees too much.

        This is tested on two token sequences that differ only in the last token, and on both without that token.
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
            # compare bit by bit: capped logits differ little as long as weights are small
            alone = name is not None and torch.equal(getattr(network, name)(states), logits)
            network.train(was_training)
        scale = states.abs().max()
        if self.likelihood == "causal" and not torch.allclose(states[0, :3] / scale, states[1, :3] / scale, atol=1e-6):
            raise ValueError(
                f"Expected a causal language model, but the {network.config.model_type!r} network sees later genes and "
                "would copy the gene that it has to predict. Pass the configuration of a causal language model."
            )
        if not torch.allclose(padded[:, :3] / scale, shorter / scale, atol=1e-5):
            raise ValueError(
                "Expected a network that respects the attention mask, but the "
                f"{network.config.model_type!r} network sees padding, so its states would depend on the other cells of "
                "a batch. Pass another configuration."
            )
        return name if alone else None

    def _only_head(self) -> str | None:
        others = [name for name, _ in self.network.named_children() if name != self.network.base_model_prefix]
        return others[0] if len(others) == 1 else None

    @property
    def blocks(self) -> Sequence[Any]:
        """Blocks of the network, first to last; ALBERT has one, which all layers share."""
        lists = [module for module in self.network.base_model.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise ValueError(
                f"Expected a network with a list of blocks, but {self.network.config.model_type!r} has none. "
                "Freeze by name patterns, pass head_reads='last', and leave layer_decay and lora out."
            )
        return list(lists[0])

    def _states(self, genes: Tensor, padding: Tensor, layer: int = -1, **more: Any) -> Tensor:
        """Compute hidden states of padded token sequences after a block, ``(b, l, d)``."""
        inner = layer != -1
        found = self._through(self.network.base_model, genes, padding, output_hidden_states=inner, **more)
        return (found.hidden_states[layer] if inner else found.last_hidden_state)[: len(genes)]

    def _through(self, network: Any, genes: Tensor, padding: Tensor, **more: Any) -> Any:
        """Run a network on padded token sequences; if there are none, on one empty cell that the caller removes."""
        if not len(genes):
            # transformers cannot reshape empty tensors, and a rank without cells takes part in the backward pass
            genes, padding = _one_cell(genes), _one_cell(padding)
            more = {name: _one_cell(value) if isinstance(value, Tensor) else value for name, value in more.items()}
        more = {**self._positions(genes), **more}
        return network(input_ids=genes, attention_mask=(~padding).long(), **more)

    def _positions(self, genes: Tensor, batch: Batch | None = None) -> dict[str, Any]:
        # by default, RoBERTa counts positions from the padding token's id
        if "position_ids" not in signature(self.network.base_model.forward).parameters:
            return {}
        position = torch.arange(genes.shape[1], device=genes.device).expand(genes.shape)
        if batch is not None and batch.spacing is not None:
            there = position < batch.cu_seqlens.diff()[:, None]
            position = torch.zeros_like(genes).masked_scatter(there, places(batch, cast(RankEncoder, self.encoder)))
        return {"position_ids": position}

    def hidden(self, batch: Batch, *, layer: int = -1, first_only: bool = False) -> Tensor:
        """Compute hidden states after a block, ``(t, d)``; with ``first_only``, only of first tokens, ``(b, d)``."""
        genes, _, padding = batch.padded(pad_id=self.pad_id)
        states = self._states(genes, padding, layer=layer, **self._positions(genes, batch))
        return states[:, 0] if first_only else states[~padding]

    def first_and_last(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute input embeddings of the first block and hidden states after the last block, ``(t, d)`` each."""
        genes, _, padding = batch.padded(pad_id=self.pad_id)
        read: list[Tensor] = []
        # `output_hidden_states` would keep the states after every block, and one is needed
        watch = self.blocks[0].register_forward_pre_hook(lambda _block, states: read.append(states[0]))
        try:
            last = self._states(genes, padding, **self._positions(genes, batch))
        finally:
            watch.remove()
        # XLNet's blocks read (positions, cells); ALBERT calls its one block for every layer
        first = read[0].transpose(0, 1) if self.network.config.model_type == "xlnet" else read[0]
        return first[: len(genes)][~padding], last[~padding]

    def inputs(self, batch: Batch) -> Tensor:
        """Compute the input embeddings of the first block, ``(t, d)``."""
        return self.hidden(batch, layer=-self.config.n_layers - 1)

    def forward(self, batch: Batch) -> Outputs:
        """Compute hidden states, cell embeddings and predictions of the heads."""
        hidden = self.hidden(batch)
        cell = self.pool(hidden, batch, self.pooling)
        return Outputs(hidden, cell, self.head_outputs_after(hidden, batch))

    def gene_table(self) -> Tensor:
        """Return the embedding of each token, ``(n_tokens, d)``; in ALBERT it is narrower."""
        return self.network.get_input_embeddings().weight

    def gene_logits(self, batch: Batch, at: Tensor) -> Tensor:
        """Compute logits of the tokens at positions ``at``, ``(n, n_tokens)``.

        A causal network sees the genes before each position, a masked network all tokens of the batch.
        """
        at = at - 1 if self.likelihood == "causal" else at
        if self.head_name is not None:
            return getattr(self.network, self.head_name)(self.hidden(batch)[at])
        genes, _, padding = batch.padded(pad_id=self.pad_id)
        positions = self._positions(genes, batch)
        return self._through(self.network, genes, padding, **positions).logits[: len(genes)][~padding][at]

    def gene_loss(self, batch: Batch, at: Tensor, genes: Tensor) -> Tensor:
        """Sum the cross-entropy (nats) of ``genes`` ``(n,)`` at positions ``at``, from what the network may see."""
        head = None if self.head_name is None else getattr(self.network, self.head_name)
        if self.likelihood != "causal" or head is None or not has_plain_weights(head):
            return super().gene_loss(batch, at, genes)
        return linear_cross_entropy(self.hidden(batch)[at - 1], head.weight, head.bias, genes)

    @entry
    def on_embeddings(self, x: Tensor, padding: Tensor, *, logits: bool, **more: Any) -> Tensor:
        """Compute hidden states, or logits, of sequences of token embeddings, ``(b, l, e)`` to ``(b, l, ...)``.

        Embeddings need not be rows of the gene table: means of rows stand for uncertain genes.
        """
        more |= self._positions(padding.long())
        network = self.network if logits else self.network.base_model
        found = network(inputs_embeds=x, attention_mask=(~padding).long(), **more)
        return found.logits if logits else found.last_hidden_state

    def reconstruct(self, batch: Batch, at: Tensor, *, hide: bool) -> Tensor:
        """Compute the probability of each gene at its position, ``(n,)``.

        A causal network predicts it from the genes before. A masked network predicts it from all tokens; with ``hide``,
        those at ``at`` are masked.
        """
        shown = batch
        if hide and self.likelihood == "pseudo":
            shown = replace(batch, genes=batch.genes.index_fill(0, at, self.vocab.mask_id))
        likely = self.gene_logits(shown, at).float().softmax(1)
        return likely.gather(1, batch.genes[at, None]).squeeze(1)

    def speed_up(self, *, compile: bool = False, checkpointing: bool = False) -> None:
        """Compile the blocks, or recompute them in the backward pass to save memory."""
        for block in self.blocks:
            block.__class__ = _faster(type(block), compile, checkpointing)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return all weights, tied ones once."""
        weights = super().state_dict(*args, **kwargs)
        for name in self.tied:
            weights.pop(name, None)
        return weights

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights that :meth:`state_dict` returned."""
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
    """Make the configuration of transformers that a dictionary describes."""
    with quiet_imports():
        from transformers import AutoConfig  # this import takes seconds

    plain = {name: value for name, value in settings.items() if name not in (*_FETCHES, "model_type")}
    return AutoConfig.for_model(settings["model_type"], **plain)


def _likelihood(settings: Mapping[str, Any]) -> Likelihood:
    """Return the kind of likelihood of a network of transformers."""
    with quiet_imports():
        from transformers.models.auto import modeling_auto as auto

    kind = settings["model_type"]
    if kind == "xlnet":
        return "permutation"
    if not settings.get("is_encoder_decoder"):
        # BERT and similar networks also exist as decoders, which are causal
        if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not settings.get("is_decoder"):
            return "pseudo"
        if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return "causal"
    raise ValueError(
        f"Expected hf_config of a causal or masked language model of transformers, got type {kind!r}. Pass, for "
        "example, a LlamaConfig or a BertConfig."
    )


def _network(config: GeneLMConfig, n_tokens: int) -> nn.Module:
    """Make a network with new weights for our vocabulary."""
    with quiet_imports():
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
        from transformers.pytorch_utils import Conv1D

    # the attention mask alone excludes padding: a padding token would shift RoBERTa's positions
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
    """Convert GPT-2's transposed linear layer to a plain one, which adapters and int8 support."""
    linear = nn.Linear(*transposed.weight.shape)
    with torch.no_grad():
        linear.weight.copy_(transposed.weight.T)
        linear.bias.copy_(transposed.bias)
    return linear


def _n_positions(config: Any) -> int | None:
    """Return the number of positions of a network; ``None`` if it has no table of positions."""
    most = getattr(config, "max_position_embeddings", None)
    return most if most and most > 0 else None
