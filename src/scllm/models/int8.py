"""Linear layers and embedding tables with int8 weights and one scale per row.

A row ``w`` is stored as ``round(w / s)`` with ``s = max|w| / 127``, so the error is at most half a step of the row.
LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv:2208.07339) and torchao use the same symmetric scales of output rows.
``weight`` can still be read in floats, so that code that reads weights directly, such as tied output tables, works.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from re import fullmatch
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from scllm.models.base import CellModel

__all__ = [
    "Int8Embedding",
    "Int8Linear",
    "WeightDtype",
    "has_plain_weights",
    "prepare_int8",
    "round_rows",
    "to_float",
    "to_int8",
]

WeightDtype = Literal["float32", "int8", "int8_dynamic"]

# shorter rows would hardly become smaller, because each has a scale of four bytes
_SHORTEST = 8
# rows of activations at a time: in the caches, rounding them costs little compared with the product
_ROWS = 256
_STORED = (".weight_int8", "_int8")


def round_rows(weight: Tensor, dims: tuple[int, ...] = (1,)) -> tuple[Tensor, Tensor]:
    """Round weights to int8, with scales that are equal along ``dims``; a row of zeros has scale 1."""
    largest = weight.detach().float().abs().amax(dims, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return (weight.detach().float() / scale).round().to(torch.int8), scale.to(weight.dtype)


class _Int8Weight(nn.Module):
    """Common part of int8 linear layers and tables: the matrix, its scales, and the weights in floats."""

    weight_int8: nn.Parameter
    scale: Tensor

    def _store(self, weight: Tensor) -> None:
        rounded, scale = round_rows(weight)
        self.weight_int8 = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """Weights in floats, computed at each access."""
        return self.weight_int8.to(self.scale.dtype) * self.scale


class Int8Linear(_Int8Weight, nn.Linear):  # type: ignore[override]
    """A linear layer with int8 weights and one scale per output.

    Parameters
    ----------
    linear
        The layer to convert.
    dynamic
        Whether activations are rounded too, each token by its own largest value, on a CPU and without gradients. The
        product of integers is exact and does not depend on other tokens.
    """

    def __init__(self, linear: nn.Linear, dynamic: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dynamic = linear.in_features, linear.out_features, dynamic
        self._store(linear.weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d_in)`` to ``(..., d_out)``."""
        if not self.dynamic or x.is_cuda or (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, self.weight, self.bias)
        return self._integer_product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def _integer_product(self, x: Tensor) -> Tensor:
        found = x.new_empty(len(x), self.out_features)
        transposed, scale = self.weight_int8.t(), self.scale.t().float()
        for part, out in zip(x.split(_ROWS), found.split(_ROWS), strict=True) if len(x) else ():
            step = part.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
            product = torch._int_mm((part / step).round().to(torch.int8), transposed)
            product = product.float().mul_(step).mul_(scale)
            out.copy_(product if self.bias is None else product.add_(self.bias))
        return found


class Int8Embedding(_Int8Weight, nn.Embedding):  # type: ignore[override]
    """A table with int8 rows and one scale per row; only rows that are looked up are converted to floats."""

    def __init__(self, table: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx, self.max_norm = table.padding_idx, None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self._store(table.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape to ``(..., d)``."""
        return self.weight_int8[input].to(self.scale.dtype) * self.scale[input]


def to_int8(model: CellModel, dtype: WeightDtype, names: Iterable[str] | None = None) -> None:
    """Round the weights of linear layers and tables to int8, in place.

    Parameters
    ----------
    model
        The model. Subclasses of these layers are left as they are, because their forward pass may differ.
    dtype
        ``"int8_dynamic"`` rounds activations too.
    names
        Which modules (or ``module.matrix`` of those in the model's ``matrices``) to round. ``None``: all with long
        enough rows except linear heads, which have few weights and read the small differences between cells.
    """
    chosen = None if names is None else set(names)
    tied: dict[int, nn.Module] = {}
    others = {id(module): matrices for module, matrices in model.matrices()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None):
            is_rounded = module.weight.shape[1] >= _SHORTEST and not fullmatch(r"heads\.\d+", name)
            # a file names weights that two layers share only once
            if is_rounded if chosen is None else name in chosen or id(module.weight) in tied:
                _replace(model, name, _rounded(module, dtype, tied))
        elif id(module) in others:
            matrices = others.pop(id(module))
            if chosen is None or any(f"{name}.{which}" in chosen for which in matrices):
                _round_matrices(module, matrices)
    model.weight_dtype = dtype
    model.layers_changed()


def prepare_int8(model: CellModel, dtype: str, names: Iterable[str]) -> None:
    """Convert the layers whose weights a file stores as int8, in place."""
    if dtype not in get_args(WeightDtype):
        raise ValueError(
            f"Expected weight_dtype to be one of {get_args(WeightDtype)}, but the model has {dtype!r}. Update scllm, "
            "or copy the model again."
        )
    if dtype != "float32":
        modules = [name.removesuffix(end) for name in names for end in _STORED if name.endswith(end)]
        to_int8(model, dtype, modules)  # type: ignore[arg-type]


def to_float(model: CellModel) -> None:
    """Convert int8 weights back to floats, in place; the rounding error remains."""
    tied: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, _Int8Weight):
            plain: Any
            if isinstance(module, Int8Linear):
                plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                plain.bias = module.bias
            else:
                plain = nn.Embedding(*module.weight_int8.shape, device="meta")  # type: ignore[misc]
            plain.weight = tied.setdefault(id(module.weight_int8), nn.Parameter(module.weight))
            _replace(model, name, plain.train(module.training))
        elif hasattr(type(module), "int8_matrices"):
            _matrices_to_float(module)
    model.weight_dtype = "float32"
    model.layers_changed()


def has_plain_weights(module: nn.Module) -> bool:
    """Return whether a layer only multiplies by its ``weight``, without an adapter or rounding of activations."""
    return type(module) is nn.Linear or (type(module) is Int8Linear and not module.dynamic)


def _rounded(module: nn.Module, dtype: WeightDtype, tied: dict[int, nn.Module]) -> nn.Module:
    """Return the layer in int8; weights that two layers share stay shared."""
    new = Int8Linear(module, dtype == "int8_dynamic") if isinstance(module, nn.Linear) else Int8Embedding(module)  # type: ignore[arg-type]
    first = tied.setdefault(id(module.weight), new)
    new.weight_int8, new.scale = first.weight_int8, first.scale  # type: ignore[assignment]
    return new.train(module.training)


@cache
def _with_int8(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Make a subclass of a module whose matrices are int8 and are converted to floats wherever it reads them.

    torch's own ``parametrize`` does the same, but keeps the module alive until the next garbage collection.
    """

    def floats(which: str) -> property:
        return property(lambda module: _floats(module, which))

    return type(f"Int8{kind.__name__}", (kind,), {"int8_matrices": names, **{which: floats(which) for which in names}})


def _floats(module: nn.Module, which: str) -> Tensor:
    scale: Tensor = getattr(module, f"{which}_scale")
    return getattr(module, f"{which}_int8").to(scale.dtype) * scale


def _round_matrices(module: nn.Module, matrices: Mapping[str, tuple[int, ...]]) -> None:
    """Store matrices of a module as int8, in place, with a scale along the given axes."""
    for which, dims in matrices.items():
        rounded, scale = round_rows(getattr(module, which), dims)
        delattr(module, which)
        module.register_parameter(f"{which}_int8", nn.Parameter(rounded, requires_grad=False))
        module.register_buffer(f"{which}_scale", scale)
    module.__class__ = _with_int8(type(module), tuple(matrices))  # type: ignore[arg-type]


def _matrices_to_float(module: nn.Module) -> None:
    """Convert int8 matrices of a module back to floats, in place."""
    names: tuple[str, ...] = type(module).int8_matrices  # type: ignore[attr-defined]
    floats = {which: nn.Parameter(_floats(module, which)) for which in names}
    module.__class__ = type(module).__bases__[0]
    for which, weight in floats.items():
        delattr(module, f"{which}_int8")
        delattr(module, f"{which}_scale")
        module.register_parameter(which, weight)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
