"""The maths of a bank: each row of a batch with the factors of its own adapter, as pure functions of tensors.

    b rows of n entries each, A (b, r, in), B (b, out, r), s (b,)

    y_i  <-  y_i + s_i (x_i A_i^T) B_i^T        for each row i: two products, batched over the rows

No sorting, no waiting for the device, static shapes: 64 adapters cost what one costs, but for the copies of
the factors, b r (in + out) numbers. A row of the base has zeros for A and B, and gets y back, bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import compute_dtype


def add_by_row(
    y: Tensor, x: Tensor, A: Tensor, Bt: Tensor, scaling: Tensor, base: Tensor | None = None
) -> Tensor:
    """Return y + s (x A^T) B^T, with the A, B and s of each row.

    Args:
        y: (b · k, ..., out), floating point; what the base returned.
        x: (b · k, ..., in); what the base was given, after dropout if there is any. What belongs to one row
            stands together.
        A: (b, r, in).
        Bt: (b, r, out), B transposed.
        scaling: (b,).
        base: (b,), bool: the rows that get y itself; None where there are none.

    Returns:
        In y's shape and dtype. A and B are brought to x's dtype, being small, and not x to theirs.
    """
    dtype = compute_dtype(x)
    b = A.shape[0]
    n = y.numel() // (b * Bt.shape[2])  # entries of a row
    factors = scaling.to(dtype)[:, None, None]
    h = torch.bmm(x.reshape(b, n, -1), A.to(dtype).mT) * factors  # (b, n, r)
    rows = y.reshape(b, n, -1)
    if y.dtype == dtype:
        result = torch.baddbmm(rows, h, Bt.to(dtype))
    else:
        result = rows + torch.bmm(h, Bt.to(dtype)).to(y.dtype)
    if base is not None:
        result = torch.where(
            base[:, None, None], rows, result
        )  # y + 0 may differ from y: -0, and inf times 0
    return result.view(y.shape)


def dropped(x: Tensor, p: Tensor) -> Tensor:
    """Return x with elements dropped with the probability of each row, and the others scaled up.

    Args:
        x: (b · k, ...).
        p: (b,), from 0 to 1.

    Returns:
        In x's shape and dtype.
    """
    p = p.view(-1, *(1 for _ in range(2))).to(torch.float32)
    flat = x.reshape(p.shape[0], 1, -1)
    kept = torch.rand(flat.shape, device=x.device, dtype=torch.float32) >= p
    factor = torch.where(p < 1, 1 / (1 - p), torch.zeros_like(p))
    return (flat * (kept * factor).to(x.dtype)).view(x.shape)


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b with the W and b of each row.

    Args:
        x: (b · k, ..., in).
        weight: (b, out, in).
        bias: (b, out), or None.

    Returns:
        (b · k, ..., out).
    """
    b, out, _ = weight.shape
    if b == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    rows = x.reshape(b, -1, x.shape[-1])
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias[:, None], rows, weight.mT)
    return y.view(*x.shape[:-1], out)
