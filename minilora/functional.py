"""The maths of a low-rank linear layer, as pure functions of tensors.

Notation: n tokens, a layer of (out, in), rank r, A (r, in), B (out, r), s = scaling.

    W_eff = W + s B A            y = x W_eff^T + b = x W^T + b + s (x A^T) B^T

(Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return W + s B A, accumulated in at least float32 and rounded once.

    Args:
        weight: (out, in), or (in, out) where `transposed`; floating point.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        transposed: whether the weight, and so the result, is stored as (in, out).
        dtype: of the result; None means the weight's.

    Returns:
        A new tensor of the weight's shape, differentiable in all three tensors.
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    left, right = (lora_A.T, lora_B.T) if transposed else (lora_B, lora_A)
    # Autocast would round the product to 16 bits.
    with torch.autocast(weight.device.type, enabled=False):
        result = torch.addmm(weight.to(exact), left.to(exact), right.to(exact), alpha=scaling)
    return result.to(dtype or weight.dtype)


def low_rank_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return s (x A^T) B^T: what the update adds to the layer's output.

    Args:
        x: (..., in), of any floating dtype. Outside autocast it is brought to A's dtype.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s, applied to the (..., r) product, where it costs least.

    Returns:
        (..., out), in A's dtype, or autocast's.
    """
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(lora_A.dtype)
    return F.linear(F.linear(x, lora_A) * scaling, lora_B)
