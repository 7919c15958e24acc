"""What counts as a linear layer, how it stores its weight, and whether its call is plain."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

from torch import Tensor, nn

from .config import is_float_dtype
from .torch_internals import has_hooks, own_parameters


class LinearShape(NamedTuple):
    """The shape of a linear layer, and whether its weight is stored as (in, out) instead of (out, in)."""

    out_features: int
    in_features: int
    transposed: bool


def linear_shape(module: nn.Module) -> LinearShape | None:
    """Return the shape of a linear layer, or None for anything else.

    A linear layer is an `nn.Linear`, transformers' `Conv1D` (GPT-2; weight stored transposed), or a
    module that says so by its integer `in_features` and `out_features`, as quantised layers do.
    """
    if _is_conv1d(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows, columns = weight.shape
        return LinearShape(out_features=columns, in_features=rows, transposed=True)
    out_features = getattr(module, "out_features", None)
    in_features = getattr(module, "in_features", None)
    if not isinstance(out_features, int) or not isinstance(in_features, int):
        return None
    if out_features < 1 or in_features < 1:
        return None  # an nn.LazyLinear before its first call
    return LinearShape(out_features, in_features, transposed=False)


def plain_weight(module: nn.Module) -> nn.Parameter | None:
    """Return the layer's weight where it is an ordinary parameter that can be computed with, else None.

    A parametrized one, which is computed anew at each reading, is not read to find out.
    """
    weight = own_parameters(module).get("weight")
    return weight if is_plain(weight) and isinstance(weight, nn.Parameter) else None


def is_plain(weight: object) -> TypeGuard[Tensor]:
    """Return whether a weight is an ordinary tensor of a dtype for weights, so that W + s B A can be formed.

    A packed, quantised or distributed one is a tensor subclass, not of such a dtype, or no tensor at all.
    """
    return type(weight) in (Tensor, nn.Parameter) and is_float_dtype(weight.dtype)  # type: ignore[attr-defined]


def computes_plainly(module: nn.Module) -> bool:
    """Return whether calling the module does nothing but F.linear with its own plain weight and bias."""
    return plain_weight(module) is not None and call_problem(module) is None and not is_managed(module)


def call_problem(module: nn.Module) -> str | None:
    """Return why W + s B A in the place of W would not do what the layer and its update do, or None.

    A subclass may compute something else from its weight, and hooks may change what goes in or comes out.
    """
    kind = type(module)
    if not (_is_conv1d(module) or getattr(kind, "forward", None) is nn.Linear.forward):
        return f"{kind.__name__} computes in a way of its own, not y = x W^T + b as nn.Linear does"
    if has_hooks(module):
        return "it has hooks, which may change what it computes; remove them first"
    if "forward" in vars(module) and not is_managed(module):
        return "its forward has been replaced on the instance"
    return None


def is_managed(module: nn.Module) -> bool:
    """Return whether accelerate moves the layer's input, and its weights perhaps, at each call."""
    return "_hf_hook" in vars(module)


def is_of_peft(module: nn.Module) -> bool:
    """Return whether PEFT put the module into the model, around a layer of it."""
    return any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__)  # PEFT is not imported


def _is_conv1d(module: nn.Module) -> bool:
    # Recognised by name, because importing transformers for an isinstance check costs seconds.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
