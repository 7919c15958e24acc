"""Plain LoRA on a linear layer in the delta form, forward and backward, as a pure function of tensors.

    h = m x A^T    (n, r)     y = x W^T + b + s h B^T

    dx = g W + m (s g B) A     dA = (s g B)^T (m x)     dB = s g^T h     db = sum over tokens of g

The notation is that of `functional`; m is what `dropout` drew, or all ones, and its 1 / (1 - p) is in s. Kept
for the backward are x and m, and h, which is small; what dropout makes of x is formed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import compute_dtype, without_autocast
from ..torch_internals import is_transforming
from .dropout import kept


def delta_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    transposed: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Return x W^T + b + s (x̂ A^T) B^T: the delta form, in which W_eff is never formed, nor rounded.

    The weight is taken as frozen: it gets no gradient.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) where `transposed`.
        bias: (out,) or None.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        transposed: whether the weight is stored as (in, out).
        dropout: the probability with which an element of x is dropped on its way to A.

    Returns:
        (..., out), in `compute_dtype(x)`; differentiable, to any order, in x, A, B and the bias. A and B are
        brought to that dtype, being small.
    """
    dtype = compute_dtype(x)
    mask = kept(x, dropout) if dropout else None
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    W = weight.T if transposed else weight
    scale = scaling / (1 - dropout) if dropout < 1 else 0.0  # of nothing
    arguments = (x, W.to(dtype), bias, mask, lora_A, lora_B, scale)
    y, _ = _DeltaLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return y  # type: ignore[no-any-return]


class _DeltaLinear(torch.autograd.Function):
    """Return y and h^T, (r, n): the long side is kept contiguous, as in `plain_linear`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
    ) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, W, bias)
        h = lora_A.to(x.dtype) @ masked(rows, mask).T
        y = added(y, h.T, lora_B.to(x.dtype).T, scaling)
        return y.view(*x.shape[:-1], y.shape[-1]), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, mask, lora_A, lora_B, ctx.scaling = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, W, mask, lora_A, lora_B, output[1])
        ctx.save_for_forward(x, W, mask, lora_A, lora_B, output[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        """Forward mode: dy = dx W^T + s (m dx A^T + m x dA^T) B^T + s h dB^T + db."""
        x, W, mask, lora_A, lora_B, h = ctx.saved_tensors
        dx, _, db, _, dA, dB, _ = tangents
        A, B, s, shape = lora_A.to(x.dtype), lora_B.to(x.dtype), ctx.scaling, (*x.shape[:-1], -1)
        parts = []
        if dx is not None:
            parts += [F.linear(dx, W), F.linear(F.linear(masked(dx, mask), A), B) * s]
        if dA is not None:
            parts.append(F.linear(F.linear(masked(x, mask), dA.to(x.dtype)), B) * s)
        if dB is not None:
            parts.append(F.linear(h.T.reshape(*x.shape[:-1], h.shape[0]), dB.to(x.dtype)) * s)
        if db is not None:
            parts.append(db.expand(*shape))
        return sum(parts[1:], parts[0]) if parts else None, None

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, mask, lora_A, lora_B, h = ctx.saved_tensors
        needs_x, needs_b, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 2, 4, 5))
        dx = db = dA = dB = None
        with without_autocast(g):
            g_rows, x_rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            A, B = lora_A.to(g.dtype), (lora_B * ctx.scaling).to(g.dtype)
            if needs_A or (needs_B and torch.is_grad_enabled()):
                dropped = masked(x_rows, mask)
            if needs_x or needs_A:
                gB = B.T @ g_rows.T  # (r, n)
            if needs_x:
                dx = back_to_x(g_rows @ W, gB.T, A, mask).view(x.shape)
            if needs_b:
                db = g_rows.sum(0)
            if needs_A:
                dA = (gB @ dropped).to(lora_A.dtype)
            if needs_B:
                if torch.is_grad_enabled():  # a second derivative goes through x and A
                    h = A @ dropped.T
                dB = ((h @ g_rows).to(lora_B.dtype) * ctx.scaling).T
        return dx, None, db, None, dA, dB, None


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return m x."""
    return x if mask is None else x * mask.view(x.shape).to(x.dtype)


def added(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return y + s L R, written into y, which is ours alone, where nobody has to see what y was before."""
    if torch.is_grad_enabled() or is_transforming():
        return torch.addmm(y, left, right, alpha=scaling)
    return y.addmm_(left, right, alpha=scaling)


def back_to_x(dx: Tensor, gB: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """Return dx + m (g B A), as `added` does."""
    if mask is None:
        return added(dx, gB, A, 1.0)
    update = gB @ A
    m = mask.view(update.shape).to(update.dtype)
    if torch.is_grad_enabled() or is_transforming():
        return torch.addcmul(dx, update, m)
    return dx.addcmul_(update, m)
