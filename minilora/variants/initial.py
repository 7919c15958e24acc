"""How A and B begin.

    kaiming      A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0          as loralib's linear layers and PEFT begin
    gaussian     A ~ N(0, (1/r)^2), B = 0
    orthogonal   A and B from the odd and the even rows of one orthogonal matrix: neither is zero, B A is
    pissa        s B A is the best approximation of W of rank r (Meng et al. 2024, https://arxiv.org/abs/2404.02948)
    olora        B and A are the first r columns of Q and rows of R in W = Q R
                 (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775)

The last two begin away from zero, and their papers subtract s B0 A0 from the base. Here the base is never
written to: the update is s (B A - B0 A0), which is s [B, -B0] [A; A0], with A0 and B0 kept and frozen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..config import LoRAConfig
from ..errors import TargetError
from ..layout import Layout


def initial_values(
    config: LoRAConfig, layout: Layout, weight: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the initial A (..., r, in) and B (..., out, r), in float32 at least.

    Args:
        config: of the layer.
        layout: how its weight is seen as a matrix, or a stack of them.
        weight: W, as stored; needed where `config.begins_at_weight`. None for one that is quantised.
        generator: on the CPU, so that all devices and dtypes start from one draw.

    Raises:
        TargetError: when W is needed and has no values, or not as many directions as the rank asks for.
    """
    shape_a, shape_b = (*layout.leading, config.r, layout.inputs), (*layout.leading, layout.outputs, config.r)
    if config.begins_at_weight:
        return _from_weight(config, layout, weight)
    if config.init == "orthogonal":
        return _orthogonal(shape_a, shape_b, generator)
    A = torch.empty(shape_a, device="cpu", dtype=torch.float32)
    if config.init == "kaiming":
        bound = 1 / math.sqrt(layout.fan_in or layout.inputs)
        A.uniform_(-bound, bound, generator=generator)
    else:
        A.normal_(0.0, 1 / config.r, generator=generator)
    return A, torch.zeros(shape_b, device="cpu")


def change_since(A: Tensor, B: Tensor, A_start: Tensor, B_start: Tensor) -> tuple[Tensor, Tensor]:
    """Return [A; A0] (..., 2r, in) and [B, -B0] (..., out, 2r), whose product is B A - B0 A0."""
    return torch.cat([A, A_start], dim=-2), torch.cat([B, -B_start], dim=-1)


def _orthogonal(
    shape_a: tuple[int, ...], shape_b: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)

    *leading, r, inputs = shape_a
    Q = torch.linalg.qr(normal(*leading, r, r)).Q
    # The rows of Q are orthogonal to each other, so B A = (...) Q_even Q_odd^T (...) = 0.
    A = Q[..., 0::2, :].mT @ normal(*leading, r // 2, inputs) / 10
    B = normal(*shape_b[:-1], r // 2) @ Q[..., 1::2, :] / 10
    return A, B


def _from_weight(config: LoRAConfig, layout: Layout, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    r, s = config.r, config.scaling
    if weight is None or weight.is_meta:
        raise TargetError(
            f"init={config.init!r} reads the weight, which is quantised or has no values here; choose another"
        )
    if r > min(layout.outputs, layout.inputs):
        raise TargetError(
            f"init={config.init!r} takes r directions out of the weight, and it has "
            f"{min(layout.outputs, layout.inputs)}: lower r from {r}, or choose another init"
        )
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    matrix = matrix.flatten(1) if not layout.leading else matrix
    matrix = matrix.mT if layout.transposed else matrix  # (..., out, in)
    if config.init == "pissa":
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        root = (S[..., :r] / s).sqrt()
        return root[..., None] * V[..., :r, :], U[..., :r] * root[..., None, :]
    Q, R = torch.linalg.qr(matrix)
    return R[..., :r, :], Q[..., :r]
