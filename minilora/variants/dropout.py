"""Dropout on what the low-rank path reads (Srivastava et al. 2014, JMLR 15, 1929-1958).

    x̂ = m x / (1 - p)      m, one number for each element of x: 1 with probability 1 - p, else 0

`torch.manual_seed` decides, and a checkpoint that computes a block again restores torch's state and sees the
same m. On a CPU torch draws one number after the other for each element; here one number of 64 bits is drawn
for four elements, since 16 bits give 1 - p to 2^-17, which no sample of less than 2^30 elements could tell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import is_compiling, is_transforming


def dropped(x: Tensor, p: float) -> Tensor:
    """Return m x / (1 - p), in x's shape and dtype; x itself where p is zero.

    Args:
        x: of any shape.
        p: the probability with which an element is dropped; zeros are returned where it is 1.
    """
    if not p:
        return x
    if not _is_drawn_by_four(x, p):
        return F.dropout(x, p)
    return x * (kept(x, p).to(x.dtype) / (1 - p))


def kept(x: Tensor, p: float) -> Tensor:
    """Return m, in x's shape; of 8 bits, to be kept for the backward.

    Args:
        x: of any shape; its shape and its device count.
        p: the probability with which an element is dropped.
    """
    if not _is_drawn_by_four(x, p):
        return (torch.rand_like(x, dtype=torch.float32) >= p).to(torch.uint8)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    bits = numbers.view(torch.int16)[: x.numel()].view(x.shape)
    # In place, since torch compares into bool, and reads bool, one element after the other.
    return bits.ge_(round(p * 2**16) - 2**15).to(torch.uint8)


def _is_drawn_by_four(x: Tensor, p: float) -> bool:
    traced = is_compiling() or is_transforming()  # which know how torch draws
    return x.device.type == "cpu" and p <= 0.9 and not traced and not x.is_nested
