"""`BankEmbedding`: an embedding with many LoRA updates beside it.

A token is looked up in the base, (V, d), and in its row's A, (r, V); what is found there goes through B:

    y  <-  W[token] + s (A[:, token]) B^T
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..torch_internals import has_hooks
from .gathered import add_by_row, dropped
from .rows import Rows
from .site import LowRankSite


class BankEmbedding(LowRankSite):
    """An embedding that adds to each row what the adapter of that row adds."""

    def forward(self, ids: Tensor) -> Tensor:
        """Map (rows, ...) to (rows, ..., d).

        Raises:
            MiniLoRAError: when the first dimension is no multiple of the rows that were chosen.
        """
        y: Tensor = self.base(ids)
        rows = self.chosen()
        return y if rows is None or not y.numel() else self._added(y, ids, rows)

    def _added(self, y: Tensor, ids: Tensor, rows: Rows) -> Tensor:
        rows.per_row(ids.shape[0])
        slots = rows.slots.to(ids.device)
        values, index = self.lora_A.source(rows, ids.device)  # (n, r, V), (b,)
        flat = ids.reshape(index.shape[0], -1)
        low = values[index[:, None], :, flat]  # (b, tokens of a row, r)
        padding = getattr(self.base, "padding_idx", None)
        if isinstance(padding, int):  # no gradient reaches what stands for nothing
            low = torch.where((flat == padding)[..., None], low.detach(), low)
        if self.training and rows.drops:  # a token is a one-hot vector: dropout drops it whole
            low = low * dropped(low.new_ones(*low.shape[:2], 1), self.dropout[slots])
        Bt = self.lora_B.by_row(rows, ids.device)
        identity = torch.eye(low.shape[-1], dtype=low.dtype, device=low.device).expand(Bt.shape[0], -1, -1)
        scaling, base = self.scaling[slots], rows.of_base(slots)
        return add_by_row(y, low.view(*ids.shape, -1), identity, Bt, scaling, base)


def adds_up(embedding: nn.Module) -> bool:
    """Return whether an update can be added to what an embedding returns: it looks up, and does no more."""
    return (
        getattr(type(embedding), "forward", None) is nn.Embedding.forward
        and getattr(embedding, "max_norm", None) is None
        and not getattr(embedding, "scale_grad_by_freq", False)
        and not has_hooks(embedding)
        and "forward" not in vars(embedding)
    )
