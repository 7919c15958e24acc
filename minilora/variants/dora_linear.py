"""DoRA on a linear layer in the weight form, forward and backward, as a pure function of tensors.

    V = W + s B A    (out, in)     n = |V|     c = m / n     z = x V^T + b     y = c z + (1 - c) b

V is formed once for the norms and the product. The gradient g = dL/dy is never scaled over the tokens: c, one
number for each output, goes into the small factors instead.

    dx = g (c V)     dA = s (g c B)^T x     dB = s c g^T (x A^T)     dm = sum over tokens of g (z - b) / n
    db = sum over tokens of g

The notation is that of `functional`; what is taken as constant, that of `dora`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import compute_dtype, without_autocast
from . import dora
from .function import Function
from .plain_linear import gradient_of_A, gradient_of_B, parts_of_tangent


def magnitude_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude: Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """Return x W_eff^T + b with DoRA's W_eff = c V, in the weight form.

    The weight is taken as frozen: it gets no gradient.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) where `transposed`.
        bias: (out,) or None.
        lora_A: (r, in).
        lora_B: (out, r).
        scaling: the factor s.
        magnitude: m, (out,).
        transposed: whether the weight is stored as (in, out).

    Returns:
        (..., out), in `compute_dtype(x)`; differentiable, to any order, in x, A, B, m and the bias.
    """
    dtype, rows = compute_dtype(x), x.reshape(-1, x.shape[-1])
    with torch.no_grad():  # its share of the gradient is in the backward below
        V = dora.direction(weight, lora_A, lora_B, scaling, transposed=transposed)
        n = dora.lengths(V, transposed)
    V, fixed = V.to(dtype), (weight, scaling, transposed)
    bias = None if bias is None else bias.to(dtype)
    y, _ = _MagnitudeLinear.run(rows.to(dtype), V, n, bias, lora_A, lora_B, magnitude, *fixed)
    return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class _MagnitudeLinear(Function):
    """Return y and z, (n, out). V is kept or formed again for the backward as `functional` tells of W_eff."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        V: Tensor,
        n: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        weight: Tensor,
        scaling: float,
        transposed: bool,
    ) -> tuple[Tensor, Tensor]:
        z = F.linear(x, V.T if transposed else V, bias)
        return dora.rescaled(z, dora.factors(magnitude, n), bias, -1), z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, V, n, bias, lora_A, lora_B, magnitude, weight, ctx.scaling, ctx.transposed = inputs
        ctx.mark_non_differentiable(output[1])
        kept = V if V.dtype.itemsize < weight.dtype.itemsize else None
        ctx.save_for_backward(x, kept, n, bias, lora_A, lora_B, magnitude, weight, output[1])
        ctx.save_for_forward(x, V, n, bias, lora_A, lora_B, magnitude, output[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, None]:
        """Forward mode: dy = c (dx V^T + s (x dA^T) B^T + s (x A^T) dB^T) + (dm / n) (z - b)."""
        x, V, n, bias, lora_A, lora_B, magnitude, z = ctx.saved_tensors
        dx, _, _, db, dA, dB, dm, _, _, _ = tangents
        c, W = dora.factors(magnitude, n), V.T if ctx.transposed else V
        parts = [c * part for part in parts_of_tangent(x, W, lora_A, lora_B, ctx.scaling, (dx, dA, dB))]
        if dm is not None:
            parts.append(dora.factors(dm, n) * (z if bias is None else z - bias))
        if db is not None:
            parts.append(db.expand(z.shape))
        return (sum(parts[1:], parts[0]).to(z.dtype) if parts else None), None

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, V, n, bias, lora_A, lora_B, magnitude, weight, z = ctx.saved_tensors
        s, transposed, again = ctx.scaling, ctx.transposed, torch.is_grad_enabled()
        needs_x, needs_b, needs_A, needs_B, needs_m = (ctx.needs_input_grad[i] for i in (0, 3, 4, 5, 6))
        dx = db = dA = dB = dm = None
        with without_autocast(g):
            c = dora.factors(magnitude, n)
            if V is None or again:  # a second derivative goes through A and B
                V = dora.direction(weight, lora_A, lora_B, s, transposed=transposed).to(g.dtype)
            if needs_x:
                scaled = (dora.along(c, V, int(transposed)) * V).to(g.dtype)
                dx = g @ (scaled.T if transposed else scaled)
            if needs_b:
                db = g.sum(0)
            if needs_A:
                dA = gradient_of_A(g, x, lora_A, c[:, None] * lora_B) * s
            if needs_B:
                dB = gradient_of_B(g, x, lora_A, lora_B) * (c[:, None] * s)
            if needs_m:
                z = F.linear(x, V.T if transposed else V, bias) if again else z
                z = z if bias is None else z - bias  # first, so that an output of zeros has none
                sums = (g * z).sum(0, dtype=n.dtype)
                dm = dora.factors(sums, n).to(magnitude.dtype)
        return dx, None, None, db, dA, dB, dm, None, None, None
