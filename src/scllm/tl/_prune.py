"""Models with fewer weights."""

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
    """Make a model without its smallest weights, or without its smallest heads and neurons.

    Nothing is trained again: how much a model bears is for ``report`` to say, and for :func:`scllm.tl.finetune` (or
    ``pretrain(model=...)``) to mend. What is taken out stays out in both, but for adapters (``lora=``), which fill
    zeros when they are merged.

    Parameters
    ----------
    model
        A model or its path; it is left unchanged.
    amount
        Share to take out, between 0 and 1: of the weights of each linear layer (heads for labels and tables stay
        whole), or with ``structured`` of the attention heads and of the feed-forward neurons.
    structured
        ``False``: the weights smallest in absolute value become zero, the same share of every matrix (Han et al. 2015,
        arXiv:1506.02626). The model keeps its shape, and is no faster and no smaller. ``True``: heads and neurons with
        the smallest norms (Li et al. 2017, arXiv:1608.08710) are taken out for good, so that the model has fewer
        weights and computes less. Heads of all blocks are compared, each with the mean of its block, and each block
        keeps one at least; of the neurons every block loses the share, in eights. In albert all layers share the block
        that loses them; in scfoundation the decoder shrinks too. Networks given as ``hf_config`` need to be GPT-2's,
        ALBERT's or XLNet's own.

    Returns
    -------
    The pruned model, in evaluation mode, with a ``report`` as :func:`scllm.tl.quantize` writes it. What is left of each
    block stands in ``config.block_heads`` and ``config.block_hidden``.

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
            "its input, so that predicted labels may change considerably. Call tl.finetune on the pruned model."
        )
    after = copy.deepcopy(before).eval()
    if structured:
        prune_structured(after, amount)
    else:
        prune_weights(after, amount)
    after.path = None
    after.report = report(before, after)
    return after
