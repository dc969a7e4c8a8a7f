"""Quantize the weights of a model to int8."""

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
    """Quantize the weights of a model to int8, which reduces its size to nearly a quarter.

    Each row of a linear layer or of an embedding table is stored as int8 numbers and one scale, ``w = s round(w / s)``
    with ``s = max|w| / 127`` (Dettmers et al. 2022, arXiv:2208.07339). Norms, biases, linear heads and layers with
    fewer than eight numbers per row are not quantized. The model embeds, predicts, is saved and is loaded like any
    other. Only its heads can be trained, with ``tl.finetune(freeze="encoder")``.

    Parameters
    ----------
    model
        A model or its path; it is not changed.
    dtype
        ``"int8"``: matrix products are computed in floats, so that embeddings differ little and the speed is that of
        the original. ``"int8_dynamic"``: on a CPU, activations are quantized for each token, too, and matrix products
        are computed with integers. This is faster on processors with instructions for it (AVX512-VNNI), and its error
        is slightly larger.

    Returns
    -------
    The int8 model, in evaluation mode. Its ``report`` is a table with the rows ``before`` and ``after``, and these
    columns:

    - ``bytes_on_disk`` (saved folder), ``bytes_in_memory`` (weights), ``n_parameters``, ``flops_per_cell`` and
      ``cells_per_s``;
    - ``cosine_mean``, ``cosine_min`` and ``knn_overlap``, which compare embeddings with those of the original;
    - for a model that predicts labels, ``same_label``, the fraction of cells whose label is unchanged.

    All but the sizes are measured on simulated cells that express genes of the model's vocabulary. For your own cells,
    see :func:`scllm.metrics.agreement`.

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
    after.comparison = report(before, after)
    return after
