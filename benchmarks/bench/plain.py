"""The textbook form of LoRA, which minilora's own arithmetic is held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLoRA(nn.Module):
    """y = base(x) + s (x A^T) B^T, left to autograd.

    Args:
        base: the layer beside which the update is put.
        lora_A: A, (rank, in), copied.
        lora_B: B, (out, rank), copied.
        scaling: s.
        dropout: probability of dropping a value of x on the low-rank path.
        in_float32: compute the update in float32, whatever autocast says and whatever the base's dtype.
    """

    def __init__(
        self,
        base: nn.Module,
        lora_A: Tensor,
        lora_B: Tensor,
        *,
        scaling: float,
        dropout: float = 0.0,
        in_float32: bool = False,
    ) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout, self.in_float32 = base, scaling, dropout, in_float32
        self.lora_A = nn.Parameter(lora_A.detach().clone())
        self.lora_B = nn.Parameter(lora_B.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.in_float32:
            with torch.autocast(x.device.type, enabled=False):
                return y + (self.scaling * self.update(x.float())).to(y.dtype)
        return y + self.scaling * self.update(x)

    def update(self, x: Tensor) -> Tensor:
        """Return (x A^T) B^T, (..., out)."""
        low = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(F.linear(low, self.lora_A), self.lora_B)
