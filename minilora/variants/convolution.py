"""Plain LoRA on a convolution, forward and backward, as pure functions of tensors.

    h = A * x    (n, r, ...)     y = W * x + b + s B h = W_eff * x + b

    dh = s B^T g                 dx = W_eff *' g = [W, A] *' [g, dh]
    dA = dh *' x                 dB = s g h^T                            db = sum over points of g

with * for the convolution, *' for its transposes, and A's rows as r kernels; B mixes the channels of each
point. (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1, with W flattened to (out, in k...).)

A convolution over r channels is slow for what it does, and worst where it gives dx. So where there are many
points, dx comes from one convolution of the whole width: with W_eff, which is built for the forward as well,
and where W_eff would be rounded to 16 bits, with the kernels of W and A side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import compute_dtype, effective_weight, without_autocast
from ..torch_internals import is_compiling
from .choice import is_whole, prefers_weight_form
from .function import Function

Conv = Callable[..., Tensor]
"""`torch.conv1d`, `conv2d` or `conv3d`."""


def convolved(
    conv: Conv,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    stride: Any,
    padding: Any,
    dilation: Any,
) -> Tensor:
    """Return W_eff * x + b by one backward of our own; W is taken as frozen, and gets no gradient.

    A weight of full precision gives the same bits as a merged layer. `stands_in` says for what this is.

    Args:
        conv: of the weight's dimensions.
        x: (n, in, ...).
        weight: (out, in, k...).
        bias: (out,) or None.
        lora_A: (r, in k...), flattened.
        lora_B: (out, r).
        scaling: the factor s.
        stride: as `conv` takes it, and so the next two.
        padding: not by name.
        dilation: between a kernel's points.

    Returns:
        (n, out, ...), in `compute_dtype(x)`; differentiable, to any order, in x, A, B and the bias.
    """
    dtype, dims = compute_dtype(x), weight.dim() - 2
    steps = tuple(each(value, dims) for value in (stride, padding, dilation))
    bias, x = None if bias is None else bias.to(dtype), x.to(dtype)
    w_eff = h = None
    with torch.no_grad():  # their share of the gradient is in the backward below
        if is_whole(weight.dtype):
            w_eff = effective_weight(weight, lora_A, lora_B, scaling, dtype=dtype)
        else:
            weight = weight.to(dtype)
            h = conv(x, kernels(lora_A, weight, dtype), None, *steps)
    arguments = (x, w_eff, h, bias, weight, lora_A, lora_B, scaling, conv, steps)
    return _Convolution.run(*arguments)  # type: ignore[no-any-return]


def stands_in(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Return whether `convolved` does what the convolution with W_eff does, and is the cheaper way.

    Args:
        x: what the convolution is called with, like the next five.
        weight: W, without an update.
        stride: a number, or one for each dimension.
        padding: likewise, or a name.
        dilation: likewise.
        groups: into which the channels fall.
    """
    if is_compiling() or groups != 1 or isinstance(padding, str) or x.dim() != weight.dim():
        return False
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if not same or weight.requires_grad or type(weight) not in (Tensor, nn.Parameter):
        return False
    points, kernel = len(x), weight.shape[2:]
    steps = (each(value, len(kernel)) for value in (stride, padding, dilation))
    for size, k, step, more, gap in zip(x.shape[2:], kernel, *steps, strict=True):
        points *= (size + 2 * more - gap * (k - 1) - 1) // step + 1
    return prefers_weight_form(x.numel(), points * len(weight), weight.numel())


def low_rank_convolution(
    conv: Conv, x: Tensor, kernel: Sequence[int], lora_A: Tensor, lora_B: Tensor, stride: Any, padding: Any,
    dilation: Any, groups: int,
) -> Tensor:  # fmt: skip
    """Return B (A * x), by autograd: what is added to W * x in all other cases.

    Args:
        conv: of the weight's dimensions.
        x: (n, in, ...), or one without n.
        kernel: the shape of one of W's kernels, (in / groups, k...).
        lora_A: (r, in / groups k...); every group has it for its share of the channels.
        lora_B: (out, r), the factor s included; every group has its own rows.
        stride: as `conv` takes it, and so the next two.
        padding: a number, one for each dimension, or a name.
        dilation: between a kernel's points.
        groups: into which the channels fall.

    Returns:
        What the convolution returns, in B's dtype.
    """
    batched = x if x.dim() > len(kernel) else x[None]
    shares = batched.reshape(-1, kernel[0], *batched.shape[2:])  # (n groups, in / groups, ...)
    h = conv(shares, lora_A.to(x.dtype).view(-1, *kernel), None, stride, padding, dilation)
    channels = h.reshape(len(batched), groups, h.shape[1], -1)
    y = lora_B.view(groups, -1, h.shape[1]) @ channels.to(lora_B.dtype)
    return y.view(*x.shape[: x.dim() - len(kernel)], -1, *h.shape[2:])


def each(value: Any, dims: int) -> tuple[int, ...]:
    """Return a number for each dimension, of one for all or one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * (dims // len(values))


class _Convolution(Function):
    """W_eff * x + b for x (n, in, ...), given either W_eff or, for a weight in 16 bits, h.

    As `plain_linear` does, it builds W_eff again for the backward, unless it has half the size of W.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w_eff: Tensor | None,
        h: Tensor | None,
        bias: Tensor | None,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        conv: Conv,
        steps: Sequence[tuple[int, ...]],
    ) -> Tensor:
        if h is None:
            return conv(x, w_eff, bias, *steps)
        return plus_mixed(conv(x, weight, bias, *steps), h, lora_B, scaling)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w_eff, h, _, weight, lora_A, lora_B, ctx.scaling, ctx.conv, ctx.steps = inputs
        ctx.whole = h is None
        kept = w_eff if ctx.whole and w_eff.dtype.itemsize < weight.dtype.itemsize else None
        ctx.save_for_backward(x, kept, h, weight, lora_A, lora_B)
        ctx.save_for_forward(x, weight, lora_A, lora_B)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        """Forward mode: dy = W * dx + s B (A * dx + dA * x) + s dB (A * x) + db."""
        x, weight, lora_A, lora_B = ctx.saved_tensors
        dx, _, _, db, _, dA, dB, *_ = tangents
        s, W = ctx.scaling, weight.to(x.dtype)
        A = kernels(lora_A, W, x.dtype)
        parts = []
        if dx is not None:
            h = ctx.conv(dx, A, None, *ctx.steps)
            parts.append(plus_mixed(ctx.conv(dx, W, None, *ctx.steps), h, lora_B, s))
        if dA is not None:
            parts.append(mixed(ctx.conv(x, kernels(dA, W, x.dtype), None, *ctx.steps), lora_B) * s)
        if dB is not None:
            parts.append(mixed(ctx.conv(x, A, None, *ctx.steps), dB) * s)
        y = sum(parts[1:], parts[0]) if parts else None
        if db is None:
            return y
        like = ctx.conv(x, W, None, *ctx.steps) * 0 if y is None else y
        return like + db.view(-1, *(1 for _ in ctx.steps[0]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w_eff, h, weight, lora_A, lora_B = ctx.saved_tensors
        s, conv, steps = ctx.scaling, ctx.conv, ctx.steps
        needs_x, needs_b, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 3, 5, 6))
        again = torch.is_grad_enabled()  # a second derivative goes through x, A and B
        dx = db = dA = dB = None
        with without_autocast(g):
            A = kernels(lora_A, weight, g.dtype)
            if needs_A or (needs_x and not ctx.whole):
                dh = mixed(g, lora_B.T * s)
            if needs_x and ctx.whole:
                if w_eff is None or again:
                    w_eff = effective_weight(weight, lora_A, lora_B, s, dtype=g.dtype)
                dx = convolution_backward(g, x, w_eff, *steps, of_weight=False)
            elif needs_x:
                both = torch.cat([g, dh], dim=1), x, torch.cat([weight, A])
                dx = convolution_backward(*both, *steps, of_weight=False)
            if needs_b:
                db = g.movedim(1, 0).flatten(1).sum(1)
            if needs_A:
                dA = convolution_backward(dh, x, A, *steps, of_weight=True).flatten(1).to(lora_A.dtype)
            if needs_B:
                h = conv(x, A, None, *steps) if h is None or again else h
                dB = products(g, h).to(lora_B.dtype) * s
        return dx, None, None, db, None, dA, dB, None, None, None


def convolution_backward(g: Tensor, x: Tensor, W: Tensor, *steps: tuple[int, ...], of_weight: bool) -> Tensor:
    """Return the gradient of a convolution's weight, or that of its input, given g, that of its output.

    `torch.nn.grad` has a name for each number of dimensions, and knows nothing of x's layout in memory.
    """
    mask, dims = (not of_weight, of_weight, False), x.dim() - 2
    gradients = torch.ops.aten.convolution_backward(g, x, W, None, *steps, False, [0] * dims, 1, mask)
    return gradients[of_weight]  # type: ignore[no-any-return]


def kernels(lora_A: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A as r kernels, (r, in, k...)."""
    return lora_A.to(dtype).view(-1, *weight.shape[1:])


# A kernel of one point is a product of matrices, which is many times faster than a convolution; with the
# channels last in memory it is one product for all, else one for each of n.


def mixed(h: Tensor, matrix: Tensor) -> Tensor:
    """Return a matrix, (out, r), times the channels of each point, (n, r, ...): (n, out, ...)."""
    matrix = matrix.to(h.dtype)
    if not h.is_contiguous():
        return (h.movedim(1, -1) @ matrix.T).movedim(-1, 1)
    return (matrix @ h.flatten(2)).view(len(h), -1, *h.shape[2:])


def plus_mixed(y: Tensor, h: Tensor, matrix: Tensor, scaling: float) -> Tensor:
    """Return y + s `mixed(h, matrix)`, accumulated in one product."""
    matrix = matrix.to(h.dtype)
    if not y.is_contiguous():
        rows, columns = y.movedim(1, -1), h.movedim(1, -1)
        flat = torch.addmm(rows.flatten(0, -2), columns.flatten(0, -2), matrix.T, alpha=scaling)
        return flat.view(rows.shape).movedim(-1, 1)
    many = matrix.expand(len(h), -1, -1)
    return torch.baddbmm(y.flatten(2), many, h.flatten(2), alpha=scaling).view(y.shape)


def products(g: Tensor, h: Tensor) -> Tensor:
    """Return g h^T, summed over points: (n, out, ...) and (n, r, ...) to (out, r)."""
    if not g.is_contiguous():
        return g.movedim(1, 0).flatten(1) @ h.movedim(1, -1).flatten(0, -2)
    return (g.flatten(2) @ h.flatten(2).mT).sum(0)
