"""`BankLinear`: a linear layer, transformers' `Conv1D` or a quantised layer with many LoRA updates beside it.

x ──┬── base ────────────────────────────────────────┬── y
    └── A of the row's adapter ── B of it ── · s of it ─┘
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .gathered import add_by_row, dropped
from .rows import Rows
from .site import LowRankSite


class BankLinear(LowRankSite):
    """A linear layer that adds to each row what the adapter of that row adds."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map (rows, ..., in) to (rows, ..., out); called just as the base is.

        Raises:
            MiniLoRAError: when the first dimension is no multiple of the rows that were chosen.
        """
        y: Tensor = self.base(*args, **kwargs)
        rows = self.chosen()
        if rows is None or not y.numel():
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        return self._added(y, x, rows)

    def _added(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        rows.per_row(x.shape[0])
        slots = rows.slots.to(x.device)
        if self.training and rows.drops:
            x = dropped(x, self.dropout[slots])
        A, B = self.lora_A.by_row(rows, x.device), self.lora_B.by_row(rows, x.device)
        return add_by_row(y, x, A, B, self.scaling[slots], rows.of_base(slots))
