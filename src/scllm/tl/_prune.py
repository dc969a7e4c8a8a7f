"""Prune the weights of a model."""

from __future__ import annotations

import copy
from numbers import Real

from scllm._log import warn
from scllm.models.base import CellModel
from scllm.models.pruning import prune_structured, prune_weights
from scllm.tl._model import ModelLike, resolve
from scllm.tl._report import report

__all__ = ["prune"]


def prune(model: ModelLike, *, amount: float = 0.3, structured: bool = False) -> CellModel:
    """Remove the smallest weights of a model, or its attention heads and neurons with the smallest norms.

    The pruned model is not trained again. Its ``report`` shows how much it changed, and :func:`scllm.tl.finetune` (or
    ``pretrain(model=...)``) can restore accuracy. Pruned weights stay pruned during this training, except with adapters
    (``lora=``), which fill zeros when they are merged.

    Parameters
    ----------
    model
        A model or its path; it is not changed.
    amount
        Fraction to remove, between 0 and 1: of the weights of each linear layer (classification heads and embedding
        tables are not pruned) or, with ``structured``, of the attention heads and of the feed-forward neurons.
    structured
        ``False``: the weights with the smallest absolute values become zero, the same fraction of every matrix (Han et
        al. 2015, arXiv:1506.02626). The model keeps its shape and is neither faster nor smaller.

        ``True``: attention heads and neurons with the smallest norms (Li et al. 2017, arXiv:1608.08710) are removed, so
        that the model has fewer weights and needs fewer operations. Heads are compared across all blocks, after
        dividing each norm by the mean of its block, and each block keeps at least one. Each block loses the same
        fraction of its neurons, in multiples of eight. In albert, all layers share the block that is pruned; in
        scfoundation, the decoder is pruned, too. Networks given as ``hf_config`` must be those of GPT-2, ALBERT or
        XLNet.

    Returns
    -------
    The pruned model, in evaluation mode, with a ``report`` as described in :func:`scllm.tl.quantize`. The numbers of
    heads and neurons that remain in each block are in ``config.block_heads`` and ``config.block_hidden``.

    Examples
    --------
    >>> model = scllm.models.build("scgpt", vocab=[f"gene{i}" for i in range(200)], size="tiny")
    >>> scllm.tl.prune(model, amount=0.5, structured=True).config.block_hidden
    (32, 32)
    """
    if not (isinstance(amount, Real) and 0 < amount < 1):
        raise ValueError(f"Expected amount to be between 0 and 1, got {amount!r}. Pass 0.3 to remove 30 %.")
    if not isinstance(structured, bool):
        raise TypeError(
            f"Expected structured to be True or False, got {structured!r}. Pass True to remove attention heads and "
            "feed-forward neurons."
        )
    before = resolve(model, None)
    if before.weight_dtype != "float32":
        raise ValueError(
            f"Expected a model with float weights, got {before.weight_dtype} weights, whose scales depend on what was "
            "pruned. Prune first, then quantize."
        )
    if before.head_specs:
        warn(
            f"The model has a head on {before.head_specs[0].key!r} that was trained before pruning. Pruning changes "
            "its input, so that predicted labels and their distances to the training cells may change considerably. "
            "Call tl.finetune on the pruned model."
        )
    after = copy.deepcopy(before).eval()
    if structured:
        prune_structured(after, amount)
    else:
        prune_weights(after, amount)
    after.path = None
    after.comparison = report(before, after)
    return after
