"""Models with int8 weights."""

from __future__ import annotations

import copy
from typing import get_args

from scllm.models.base import CellModel
from scllm.models.int8 import WeightDtype, to_int8
from scllm.tl._model import ModelLike, resolve
from scllm.tl._report import report

__all__ = ["quantize"]

_KINDS = get_args(WeightDtype)[1:]


def quantize(model: ModelLike, *, dtype: WeightDtype = "int8") -> CellModel:
    """Make a model of nearly a quarter of the size, whose weights are int8.

    Each row of a linear layer or of an embedding table becomes int8 numbers and one scale, ``w = s round(w / s)`` with
    ``s = max|w| / 127`` (Dettmers et al. 2022, arXiv:2208.07339). Norms and biases stay as they are, as do linear heads
    and layers whose rows are shorter than eight numbers. The model embeds, labels, predicts, is saved and is loaded
    like any other; of its weights only heads can be trained, with ``tl.finetune(freeze="encoder")``.

    Parameters
    ----------
    model
        A model or its path; it is left unchanged.
    dtype
        ``"int8"``: products are computed in floats, so that embeddings differ little and speed is that of the original.
        ``"int8_dynamic"``: on a CPU activations are rounded too, token by token, and products are those of integers:
        faster where the processor has instructions for those (AVX512-VNNI), at a little more error.

    Returns
    -------
    The int8 model, in evaluation mode. Its ``report`` has a row ``before`` and one ``after``: ``bytes_on_disk`` (of the
    saved folder), ``bytes_in_memory`` (weights), ``n_parameters``, ``flops_per_cell``, ``cells_per_s``, and against the
    original's embedding ``cosine_mean``, ``cosine_min`` and ``knn_overlap``; for a model with labels ``same_label``,
    the share of cells that keep theirs. All but the sizes are measured on planted cells over the model's own genes; for
    your own cells see :func:`scllm.metrics.agreement`.

    Examples
    --------
    >>> model = scllm.models.build("scgpt", vocab=[f"gene{i}" for i in range(2000)], size="tiny")
    >>> small = scllm.tl.quantize(model)
    >>> sizes = small.report["bytes_on_disk"]
    >>> bool(sizes["before"] / sizes["after"] > 3)
    True
    """
    if dtype not in _KINDS:
        raise ValueError(
            f"Expected dtype to be one of {', '.join(map(repr, _KINDS))}, got {dtype!r}. Pass 'int8' to stay closest "
            "to the float model."
        )
    before = resolve(model, None)
    if before.weight_dtype != "float32":
        raise ValueError(
            f"Expected a model with float weights, got {before.weight_dtype} weights. Pass the model that it was "
            "quantized from."
        )
    after = copy.deepcopy(before).eval()
    to_int8(after, dtype)
    after.path = None
    after.report = report(before, after)
    return after
