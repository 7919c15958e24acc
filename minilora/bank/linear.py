"""`BankLinear`: a linear layer, transformers' `Conv1D` or a quantised layer with many LoRA updates beside it.

x ──┬── base ────────────────────────────────────────┬── y
    └── A of the row's adapter ── B of it ── · s of it ─┘
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import LoRAConfig
from ..torch_internals import own_tensors
from ..variants.choice import can_stand_in, takes_weight_form
from ..variants.plain_linear import effective_linear
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
        rows = self.chosen()
        if rows is None:
            return self.base(*args, **kwargs)  # type: ignore[no-any-return]
        x = args[0] if args else next(iter(kwargs.values()))
        if (slot := rows.only()) is not None and len(args) == 1 and not kwargs and self._takes_weight_form(x):
            return self._in_weight_form(x, rows, slot)
        y: Tensor = self.base(*args, **kwargs)
        return self._added(y, x, rows) if y.numel() else y

    def _added(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        rows.per_row(x.shape[0])
        slots = rows.slots.to(x.device)
        if self.training and rows.drops:
            x = dropped(x, self.dropout[slots])
        A, Bt = self.lora_A.by_row(rows, x.device), self.lora_B.by_row(rows, x.device)
        return add_by_row(y, x, A, Bt, self.scaling[slots], rows.of_base(slots))

    def _takes_weight_form(self, x: Tensor) -> bool:
        """Return whether W_eff of one adapter may stand for the base's own call, and is the cheaper way."""
        if not can_stand_in(self.base, x):
            return False
        return takes_weight_form(x, own_tensors(self.base)["weight"].dtype, self.layout)

    def _in_weight_form(self, x: Tensor, rows: Rows, slot: int) -> Tensor:
        """Compute as a layer with this adapter alone would."""
        if slot not in self.configs:
            return self.base(x)  # type: ignore[no-any-return]
        A, Bt = self.lora_A.by_row(rows, x.device)[0], self.lora_B.by_row(rows, x.device)[0]
        tensors, config = own_tensors(self.base), self.configs[slot]
        assert isinstance(config, LoRAConfig)
        s, transposed = config.scaling, self.layout.transposed
        bias = tensors.get("bias")
        return effective_linear(x, tensors["weight"], bias, A, Bt.mT, s, transposed=transposed)
