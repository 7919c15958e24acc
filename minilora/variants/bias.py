"""A bias of B: y = x W_eff^T + b + s beta, which is b + s beta in the place of b.

beta, one number for each output, starts at zero and is trained beside A and B. The sum is a value in b's
place, as W_eff is in W's: the base's own code adds it, whatever kind of layer that is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..torch_internals import own_parameters


def effective_bias(bias: Tensor | None, lora_bias: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return b + s beta, (out,), accumulated in at least float32 and rounded once to a dtype.

    Args:
        bias: b, (out,), or None for zeros.
        lora_bias: beta, (out,).
        scaling: the factor s.
        dtype: of the result.
    """
    shift = lora_bias.to(torch.promote_types(lora_bias.dtype, torch.float32)) * scaling
    return (shift if bias is None else bias + shift).to(dtype)


def shape_of_bias(layer: nn.Module, base: nn.Module, parameter: str, outputs: int) -> tuple[int, ...]:
    """Return the shape of beta at a layer, whether it has a bias or only a place for one.

    Args:
        layer: itself.
        base: what it is computed by, the layer or wrappers around it.
        parameter: of the layer, that B A is added to.
        outputs: of the layer, where nothing else tells.

    Raises:
        TargetError: when there is no such place, or a copy of the bias is trained as well.
    """
    own = own_parameters(layer)
    if parameter != "weight" or "bias" not in own:
        raise TargetError(
            f"the bias of B is added to a layer's, and {type(layer).__name__} has no place for one (linear "
            "layers and convolutions have); leave it out, or set lora_bias=False"
        )
    if getattr(base, "bias", None) is not own["bias"]:
        raise TargetError("its bias is trained in full as well; leave that out, or set lora_bias=False")
    bias = own["bias"]
    return (getattr(layer, "out_channels", outputs),) if bias is None else bias.shape
