"""Which form a layer computes in; `functional` says what the two are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layout import Layout
from ..linear import computes_plainly
from ..torch_internals import is_compiling, own_tensors


def can_stand_in(layer: nn.Module, x: Tensor) -> bool:
    """Return whether y = x W^T + b, by functions of our own, does what a call of the layer does.

    Args:
        layer: linear, unmerged.
        x: (..., in), which it would be called with.
    """
    # Choosing by the number of tokens would be a graph for each side of it, at every layer shape.
    if is_compiling() or x.is_nested or not computes_plainly(layer):
        return False
    own = own_tensors(layer)
    weight, bias = own["weight"], own.get("bias")
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    # Those functions have no gradient for what somebody has thawed.
    return same and not (weight.requires_grad or (bias is not None and bias.requires_grad))


def takes_weight_form(x: Tensor, dtype: torch.dtype, layout: Layout) -> bool:
    """Return whether the weight form loses nothing and is the cheaper one.

    In 16 bits W_eff would round small updates away; under autocast W itself is still whole.

    Args:
        x: (..., in), which the layer would be called with.
        dtype: of its weight.
        layout: of its weight.
    """
    outputs = x.numel() // layout.inputs * layout.outputs
    return is_whole(dtype) and prefers_weight_form(x.numel(), outputs, layout.inputs * layout.outputs)


def is_whole(dtype: torch.dtype) -> bool:
    """Return whether a weight in a dtype can take an update in without losing what is small of it."""
    return dtype in (torch.float32, torch.float64)


def prefers_weight_form(inputs: int, outputs: int, weight: int) -> bool:
    """Return whether the weight form moves less memory than the delta form.

    Building W_eff reads W and writes W_eff, once in the forward and once in the backward. The delta form
    reads x for A's product, reads and writes y in the forward, and reads and writes dx in the backward. The
    rank weighs on both sides alike and cancels; the narrow products of the backward are the same in both.

    Args:
        inputs: how many numbers there are in x.
        outputs: in y.
        weight: in W.
    """
    return 3 * inputs + 2 * outputs > 4 * weight
