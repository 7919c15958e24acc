"""What counts as a linear layer, and how it stores its weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


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
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        rows, columns = weight.shape
        return LinearShape(out_features=columns, in_features=rows, transposed=True)
    out_features = getattr(module, "out_features", None)
    in_features = getattr(module, "in_features", None)
    if not isinstance(out_features, int) or not isinstance(in_features, int):
        return None
    if out_features < 1 or in_features < 1:
        return None  # an nn.LazyLinear before its first call
    return LinearShape(out_features, in_features, transposed=False)


def has_plain_weight(module: nn.Module) -> bool:
    """Return whether the layer's weight is an ordinary floating-point parameter that can be merged into.

    Packed, quantised and distributed weights are tensor subclasses, non-floating, or no tensors at all.
    """
    weight: object = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.is_floating_point()
    )


def computes_plainly(module: nn.Module) -> bool:
    """Return whether calling the module does nothing but F.linear with its own plain weight and bias.

    A subclass may do more, hooks may watch or change the call, and libraries that move weights between
    devices replace `forward` on the instance.
    """
    return (
        (type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) or _is_conv1d(module))
        and has_plain_weight(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and "forward" not in vars(module)
    )


def _is_conv1d(module: nn.Module) -> bool:
    # Recognised by name, because importing transformers for an isinstance check costs seconds.
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")
