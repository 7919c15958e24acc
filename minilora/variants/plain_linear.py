"""Plain LoRA on a linear layer in the weight form, forward and backward, as a pure function of tensors.

    W_eff = W + s B A    (out, in)     y = x W_eff^T + b

    dx = g W_eff     dA = s (g B)^T x     dB = s g^T (x A^T)     db = sum over tokens of g

The notation is that of `functional`. The (out, in) gradient of the weight is never needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import compute_dtype, effective_weight, without_autocast
from .function import Function


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

    The same bits as a merged layer gives. The weight is taken as frozen: it gets no gradient.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) where `transposed`.
        bias: (out,) or None.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        transposed: whether the weight is stored as (in, out).

    Returns:
        (..., out), in `compute_dtype(x)`; differentiable, to any order, in x, A, B and the bias.
    """
    dtype, rows = compute_dtype(x), x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(dtype)
    with torch.no_grad():  # its share of the gradient is in the backward below
        w_eff = effective_weight(weight, lora_A, lora_B, scaling, transposed=transposed, dtype=dtype)
    arguments = (rows.to(dtype), w_eff, bias, weight, lora_A, lora_B, scaling, transposed)
    y = _EffectiveLinear.run(*arguments)
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class _EffectiveLinear(Function):
    """The weight form with its own backward, for x (n, in).

    What it returns is no view, which nobody could write into: autograd would know of no backward then.

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
        dx, _, db, _, dA, dB, _, _ = tangents
        W = w_eff.T if ctx.transposed else w_eff
        parts = parts_of_tangent(x, W, lora_A, lora_B, ctx.scaling, (dx, dA, dB))
        if db is not None:
            parts.append(db.expand(len(x), -1))
        return sum(parts[1:], parts[0]) if parts else None

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w_eff, weight, lora_A, lora_B = ctx.saved_tensors
        s, transposed = ctx.scaling, ctx.transposed
        needs_x, needs_b, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 2, 4, 5))
        dx = db = dA = dB = None
        with without_autocast(g):
            if needs_x:
                if w_eff is None or torch.is_grad_enabled():  # a second derivative goes through A and B
                    w_eff = effective_weight(weight, lora_A, lora_B, s, transposed=transposed, dtype=g.dtype)
                dx = g @ (w_eff.T if transposed else w_eff)
            if needs_b:
                db = g.sum(0)
            if needs_A:
                dA = gradient_of_A(g, x, lora_A, lora_B) * s
            if needs_B:
                dB = gradient_of_B(g, x, lora_A, lora_B) * s
        return dx, None, db, None, dA, dB, None, None


def parts_of_tangent(
    x: Tensor, W: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, tangents: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return what each tangent adds to dy = dx W^T + s (x dA^T) B^T + s (x A^T) dB^T, those of x, A and B.

    Args:
        x: (..., in).
        W: (out, in), what x is multiplied with.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        tangents: of x, A and B; None where there is none.
    """
    dx, dA, dB = tangents
    parts = []
    if dx is not None:
        parts.append(F.linear(dx, W))
    if dA is not None:
        parts.append(F.linear(F.linear(x, dA.to(x.dtype)), lora_B.to(x.dtype)) * scaling)
    if dB is not None:
        parts.append(F.linear(F.linear(x, lora_A.to(x.dtype)), dB.to(x.dtype)) * scaling)
    return parts


# The products over all tokens keep the long side contiguous: (r, n) instead of (n, r).


def gradient_of_A(g: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return (g B)^T x in A's dtype; g is (n, out) and x (n, in)."""
    gB = lora_B.to(g.dtype).T @ g.T  # (r, n)
    return (gB @ x).to(lora_A.dtype)


def gradient_of_B(g: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return g^T (x A^T) in B's dtype; g is (n, out) and x (n, in)."""
    h = lora_A.to(g.dtype) @ x.T  # (r, n)
    return (h @ g).to(lora_B.dtype).T
