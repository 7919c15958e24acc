"""The maths of a low-rank linear layer, forward and backward, as pure functions of tensors.

Notation: n tokens, a layer of (out, in), rank r, A (r, in), B (out, r), s = scaling, g = dL/dy (n, out).

    W_eff = W + s B A            y = x W_eff^T + b = x W^T + b + s (x A^T) B^T

and where B has a bias beta (out,), b + s beta in the place of b.

(Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.) The two ways to write y are the two ways to
compute it:

    weight form   build W_eff, one product over the tokens. Costs passes over (out, in), whatever n is. It has
                  a backward of its own: `variants.plain_linear`.
    delta form    two products. Costs passes over (n, in) and (n, out); takes dropout; loses nothing of a
                  small update where W is stored in 16 bits, since W_eff is never rounded.

Neither ever needs the (out, in) weight gradient: dB = s g^T (x A^T), dA = s (g B)^T x, dx = g W_eff.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

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
        weight: (out, in), or (in, out) where `transposed`, or as `sum_with_product` takes it; floating point.
        lora_A: (r, in), or a stack of them.
        lora_B: (out, r), or a stack of them.
        scaling: the factor s.
        transposed: whether the weight, and so the result, is stored as (in, out).
        dtype: of the result; None means the weight's.

    Returns:
        A new tensor of the weight's shape, differentiable in all three tensors.
    """
    left, right = (lora_A.mT, lora_B.mT) if transposed else (lora_B, lora_A)
    return sum_with_product(weight, left, right, scaling, dtype=dtype)


def sum_with_product(
    weight: Tensor, left: Tensor, right: Tensor, scaling: float, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return W + s L R, accumulated in at least float32 and rounded once: the one definition of W_eff.

    Args:
        weight: (rows, ...) for a matrix L; (..., rows, cols) for a stack.
        left: (rows, r), or (..., rows, r).
        right: (r, cols), with all but the first of W's dimensions flattened; or (..., r, cols).
        scaling: the factor s.
        dtype: of the result; None means the weight's.

    Returns:
        A new tensor of the weight's shape, differentiable in all three tensors.
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    with without_autocast(weight):  # which would round the product to 16 bits
        if left.dim() == 2:
            flat = weight.to(exact).reshape(left.shape[0], -1)
            result = torch.addmm(flat, left.to(exact), right.to(exact), alpha=scaling)
        else:
            stack = weight.to(exact).flatten(0, -3)
            L, R = left.to(exact).flatten(0, -3), right.to(exact).flatten(0, -3)
            result = torch.baddbmm(stack, L, R, alpha=scaling)
    return result.view(weight.shape).to(dtype or weight.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies x: autocast's where it is on, else x's own."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # there is no autocast on the meta device
        return x.dtype
    return torch.get_autocast_dtype(device)


def add_low_rank(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, lora_bias: Tensor | None = None
) -> Tensor:
    """Return y + s ((x A^T) B^T + beta): the delta form, given the base's own output.

    Args:
        y: (..., out), floating point; what the base returned.
        x: (..., in); what the base was given, after dropout if there is any.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        lora_bias: beta, (out,), or None for zeros.

    Returns:
        (..., out), in y's dtype. A and B are brought to x's dtype, being small, and not x to theirs.
    """
    dtype = compute_dtype(x)
    constant = None
    if lora_bias is not None:  # one more column of B, and what it is multiplied with is always one
        constant = torch.eye(len(lora_A) + 1, dtype=dtype, device=lora_A.device)[-1]
        lora_A, lora_B = F.pad(lora_A, (0, 0, 0, 1)), torch.cat([lora_B, lora_bias[:, None]], dim=1)
    h = F.linear(x, lora_A.to(dtype), constant)  # (..., r)
    # A base may compute in a dtype of its own, as quantised layers do; a nested tensor cannot be flattened.
    if y.dtype != dtype or y.is_nested:
        return y + (F.linear(h, lora_B.to(dtype)) * scaling).to(y.dtype)
    out_features, r = lora_B.shape
    # One kernel that scales, multiplies and adds, with no (..., out) tensor in between.
    flat = torch.addmm(y.reshape(-1, out_features), h.reshape(-1, r), lora_B.to(dtype).T, alpha=scaling)
    return flat.view(y.shape)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products are formed in the dtypes of their factors."""
    on = not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)
    return torch.autocast(tensor.device.type, enabled=False) if on else nullcontext()
