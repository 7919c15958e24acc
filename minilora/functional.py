"""The maths of a low-rank linear layer, forward and backward, as pure functions of tensors.

Notation: n tokens, a layer of (out, in), rank r, A (r, in), B (out, r), s = scaling, g = dL/dy (n, out).

    W_eff = W + s B A            y = x W_eff^T + b = x W^T + b + s (x A^T) B^T

(Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1.) The two ways to write y are the two ways to
compute it:

    weight form   build W_eff, one product over the tokens. Costs passes over (out, in), whatever n is.
    delta form    two products. Costs passes over (n, in) and (n, out); takes dropout; loses nothing of a
                  small update where W is stored in 16 bits, since W_eff is never rounded.

Neither ever needs the (out, in) weight gradient: dB = s g^T (x A^T), dA = s (g B)^T x, dx = g W_eff.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def prefers_weight_form(tokens: int, out_features: int, in_features: int) -> bool:
    """Return whether the weight form moves less memory than the delta form.

    Building W_eff reads W and writes W_eff, once in the forward and once in the backward: 4 in out. The
    delta form reads x for x A^T, reads and writes y in the forward, and reads and writes dx in the backward:
    n (3 in + 2 out). The rank weighs on both sides alike and cancels; the four skinny products of the
    backward are the same in both.
    """
    return tokens * (3 * in_features + 2 * out_features) > 4 * in_features * out_features


def add_low_rank(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return y + s (x A^T) B^T: the delta form, given the base's own output.

    Args:
        y: (..., out), floating point; what the base returned.
        x: (..., in); what the base was given, after dropout if there is any.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.

    Returns:
        (..., out), in y's dtype. A and B are brought to x's dtype, being small, and not x to theirs.
    """
    dtype = compute_dtype(x)
    h = F.linear(x, lora_A.to(dtype))  # (..., r)
    # A base may compute in a dtype of its own, as quantised layers do; a nested tensor cannot be flattened.
    if y.dtype != dtype or y.is_nested:
        return y + (F.linear(h, lora_B.to(dtype)) * scaling).to(y.dtype)
    out_features, r = lora_B.shape
    # One kernel that scales, multiplies and adds, with no (..., out) tensor in between.
    flat = torch.addmm(y.reshape(-1, out_features), h.reshape(-1, r), lora_B.to(dtype).T, alpha=scaling)
    return flat.view(y.shape)


def effective_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return x W_eff^T + b: the weight form, with W_eff built for this call alone.

    The same bits as a merged layer gives. Weight and bias are taken as frozen: they get no gradient.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) where `transposed`.
        bias: (out,) or None.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        transposed: whether the weight is stored as (in, out).

    Returns:
        (..., out), in `compute_dtype(x)`; differentiable, to any order, in x, A and B.
    """
    dtype = compute_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    with torch.no_grad():  # its share of the gradient is in the backward below
        w_eff = effective_weight(weight, lora_A, lora_B, scaling, transposed=transposed, dtype=dtype)
    arguments = (x.to(dtype), w_eff, bias, weight, lora_A, lora_B, scaling, transposed)
    return _EffectiveLinear.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products are formed in the dtypes of their factors."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


class _EffectiveLinear(torch.autograd.Function):
    """The weight form with its own backward.

    In full precision W_eff is not kept for the backward, which builds it again: an (out, in) tensor for
    each layer would be a second copy of the model. Under autocast it is kept, since it has half the size,
    and autograd would keep as much of the bare layer: the rounded copy of W.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w_eff: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        transposed: bool,
    ) -> Tensor:
        return F.linear(x, w_eff.T if transposed else w_eff, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w_eff, _, weight, lora_A, lora_B, ctx.scaling, ctx.transposed = inputs
        kept = w_eff if w_eff.dtype.itemsize < weight.dtype.itemsize else None
        ctx.save_for_backward(x, kept, weight, lora_A, lora_B)
        ctx.save_for_forward(x, w_eff, lora_A, lora_B)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        """Forward mode: dy = dx W_eff^T + s (x dA^T) B^T + s (x A^T) dB^T."""
        x, w_eff, lora_A, lora_B = ctx.saved_tensors
        dx, _, _, _, dA, dB, _, _ = tangents
        parts = []
        if dx is not None:
            parts.append(F.linear(dx, w_eff.T if ctx.transposed else w_eff))
        if dA is not None:
            parts.append(F.linear(F.linear(x, dA.to(x.dtype)), lora_B.to(x.dtype)) * ctx.scaling)
        if dB is not None:
            parts.append(F.linear(F.linear(x, lora_A.to(x.dtype)), dB.to(x.dtype)) * ctx.scaling)
        return sum(parts[1:], parts[0]) if parts else None

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w_eff, weight, lora_A, lora_B = ctx.saved_tensors
        s, transposed = ctx.scaling, ctx.transposed
        needs_x, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 4, 5))
        dx = dA = dB = None
        with without_autocast(g):
            if needs_x:
                if w_eff is None or torch.is_grad_enabled():  # a second derivative goes through A and B
                    w_eff = effective_weight(weight, lora_A, lora_B, s, transposed=transposed, dtype=g.dtype)
                dx = g @ (w_eff.T if transposed else w_eff)
            # The products over all tokens keep the long side contiguous: (r, n) instead of (n, r).
            g_rows, x_rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            if needs_A:
                gB = lora_B.to(g.dtype).T @ g_rows.T  # (r, n)
                dA = (gB @ x_rows).to(lora_A.dtype) * s
            if needs_B:
                h = lora_A.to(g.dtype) @ x_rows.T  # (r, n)
                dB = (h @ g_rows).to(lora_B.dtype).T * s
        return dx, None, None, None, dA, dB, None, None
