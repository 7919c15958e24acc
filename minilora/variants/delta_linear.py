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
from ..torch_internals import is_deriving
from .dropout import kept
from .function import Function
from .plain_linear import parts_of_tangent


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
    dtype, rows = compute_dtype(x), x.reshape(-1, x.shape[-1])
    mask = kept(rows, dropout) if dropout else None
    bias = None if bias is None else bias.to(dtype)
    W = weight.T if transposed else weight
    scale = scaling / (1 - dropout) if dropout < 1 else 0.0  # of nothing
    arguments = (rows.to(dtype), W.to(dtype), bias, mask, lora_A, lora_B, scale)
    y, _ = _DeltaLinear.run(*arguments)
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class _DeltaLinear(Function):
    """Return y, (n, out), and h^T, (r, n): the long side is kept contiguous, as in `plain_linear`."""

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
        y = F.linear(x, W, bias)
        h = lora_A.to(x.dtype) @ masked(x, mask).T
        return added(y, h.T, lora_B.to(x.dtype).T, scaling), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, W, _, mask, lora_A, lora_B, ctx.scaling = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, W, mask, lora_A, lora_B, output[1])
        ctx.save_for_forward(x, W, mask, lora_A, lora_B)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        """Forward mode: dy = dx W^T + s (m dx A^T + m x dA^T) B^T + s h dB^T + db."""
        x, W, mask, lora_A, lora_B = ctx.saved_tensors
        dx, _, db, _, dA, dB, _ = tangents
        A, B, s = lora_A.to(x.dtype), lora_B.to(x.dtype), ctx.scaling
        parts = parts_of_tangent(masked(x, mask), W, A, B, s, (None, dA, dB))
        if dx is not None:
            parts += [F.linear(dx, W), F.linear(F.linear(masked(dx, mask), A), B) * s]
        if db is not None:
            parts.append(db.expand(len(x), -1))
        return sum(parts[1:], parts[0]) if parts else None, None

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, mask, lora_A, lora_B, h = ctx.saved_tensors
        needs_x, needs_b, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 2, 4, 5))
        again = torch.is_grad_enabled()  # a second derivative goes through x and A
        dx = db = dA = dB = None
        with without_autocast(g):
            A, B = lora_A.to(g.dtype), (lora_B * ctx.scaling).to(g.dtype)
            if needs_A or (needs_B and again):
                dropped = masked(x, mask)
            if needs_x or needs_A:
                gB = B.T @ g.T  # (r, n)
            if needs_x:
                dx = back_to_x(g @ W, gB.T, A, mask)
            if needs_b:
                db = g.sum(0)
            if needs_A:
                dA = (gB @ dropped).to(lora_A.dtype)
            if needs_B:
                h = A @ dropped.T if again else h
                dB = ((h @ g).to(lora_B.dtype) * ctx.scaling).T
        return dx, None, db, None, dA, dB, None


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return m x."""
    return x if mask is None else x * mask.to(x.dtype)


# Written into a tensor that is ours alone, where no derivative has to see what it was before.


def added(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """Return y + s L R, in y itself where it may be."""
    return torch.addmm(y, left, right, alpha=scaling, out=None if is_deriving() else y)


def back_to_x(dx: Tensor, gB: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """Return dx + m (g B A), in dx itself where it may be."""
    if mask is None:
        return added(dx, gB, A, 1.0)
    return torch.addcmul(dx, gB @ A, mask.to(dx.dtype), out=None if is_deriving() else dx)
