"""`Directory`: which adapter has which slot, and which rows are chosen; a bank's wrappers share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MiniLoRAError, listed, quoted
from ..names import nearest
from .rows import Choice, Rows


class Directory:
    """Names and slots. Slot 0 is the base; adapters have 1 to `slots`.

    Args:
        slots: how many adapters there is room for.
        r: the largest rank that there is room for.
        dtype: that A and B are rounded to; None where nothing may be lost.

    Example:
        >>> from minilora.bank.directory import Directory
        >>> directory = Directory(slots=2, r=8)
        >>> directory.enter("legal", directory.free())
        >>> directory.slot("legal"), directory.free()
        (1, 2)
    """

    def __init__(self, slots: int, r: int, dtype: torch.dtype | None = None) -> None:
        self.slots, self.r, self.dtype = slots, r, dtype
        self.names: dict[str, int] = {}
        self.trained: set[int] = set()
        """The slots whose adapters train."""
        self.dropping: set[int] = set()
        """The slots whose adapters have dropout."""
        self.standing = True
        """Whether the wrappers stand in a model; False once they were ejected."""
        self.choice = Choice([])

    def slot(self, name: object) -> int:
        """Return the slot of an adapter.

        Raises:
            MiniLoRAError: when there is none of that name.
        """
        if isinstance(name, str) and name in self.names:
            return self.names[name]
        near = nearest(name, self.names, limit=1) if isinstance(name, str) else []
        hint = f"; nearest: {near[0]!r}" if near else ""
        there = f"it holds {quoted(list(self.names))}" if self.names else "it holds none yet"
        raise MiniLoRAError(f"the bank has no adapter {name!r:.100}{hint}; {there}")

    def free(self) -> int:
        """Return the first slot that no adapter has.

        Raises:
            MiniLoRAError: when the bank is full.
        """
        taken = set(self.names.values())
        for slot in range(1, self.slots + 1):
            if slot not in taken:
                return slot
        raise MiniLoRAError(
            f"the bank is full: its {self.slots} slots hold {quoted(list(self.names))}. Make room with "
            "bank.remove(name) or bank.replace(name, path), or make the bank with more: Bank(..., slots=...)"
        )

    def require_new(self, name: object) -> None:
        """Raise for a name that no new adapter can have.

        Raises:
            MiniLoRAError: when it is no name, or another adapter's.
        """
        if not isinstance(name, str) or not name:
            raise MiniLoRAError(f"an adapter's name must be a string that is not empty, not {name!r:.100}")
        if name in self.names:
            raise MiniLoRAError(
                f"the bank holds {name!r} already: bank.replace(name, path) puts another adapter in its place"
            )

    def require_standing(self) -> None:
        """Raise where the bank is no longer in its model.

        Raises:
            MiniLoRAError: when it was ejected.
        """
        if not self.standing:
            raise MiniLoRAError(
                "this bank has been ejected from its model: make another, minilora.Bank(model, {...})"
            )

    def require_unchosen(self, act: str) -> None:
        """Raise where this thread computes with the adapters that an act would change.

        Raises:
            MiniLoRAError: inside `bank.rows`.
        """
        if self.choice.rows is not None:
            raise MiniLoRAError(f"{act} changes what bank.rows has chosen; leave its block first")

    def enter(self, name: str, slot: int, *, drops: bool = False) -> None:
        """Give a slot to an adapter, which does not train yet. Inverse: `strike`."""
        self.names[name] = slot
        self.trained.discard(slot)
        self.dropping.discard(slot)
        if drops:
            self.dropping.add(slot)

    def strike(self, name: str) -> None:
        """Take an adapter's slot away. Inverse: `enter`."""
        slot = self.names.pop(name)
        self.trained.discard(slot)
        self.dropping.discard(slot)

    def chosen(self, rows: object, device: torch.device) -> Rows | None:
        """Return which slot each row has; None where all are the base's.

        Args:
            rows: what `Bank.rows` takes.
            device: where the model computes.

        Raises:
            MiniLoRAError: for names that the bank does not hold, and what is no rows at all.
        """
        self.require_standing()
        trained, dropping = frozenset(self.trained), frozenset(self.dropping)
        if isinstance(rows, Tensor):
            if rows.dim() != 1 or not len(rows) or rows.is_floating_point() or rows.dtype == torch.bool:
                raise MiniLoRAError(
                    f"a tensor of rows has a slot for each row, (b,), as integers; this one is {rows.dtype}, "
                    f"of shape {tuple(rows.shape)}: torch.tensor([bank.slot(name), ...])"
                )
            if rows.device.type == "cpu":  # elsewhere, reading it would wait for the device
                held = {0, *self.names.values()}
                if empty := [str(slot) for slot in dict.fromkeys(rows.tolist()) if slot not in held]:
                    raise MiniLoRAError(f"slots {listed(empty)} hold no adapter; see bank.slot(name)")
            return Rows.of(rows, device, trained=trained, dropping=dropping)
        names = [rows] if isinstance(rows, str) or rows is None else rows
        if not isinstance(names, Sequence) or not names:
            raise MiniLoRAError(
                "rows must be a name, a list with a name or None for each row, or a tensor of slots, not "
                f"{rows!r:.100}"
            )
        if unknown := [n for n in dict.fromkeys(names) if n is not None and n not in self.names]:
            if len(unknown) == 1:
                self.slot(unknown[0])
            raise MiniLoRAError(
                f"the bank has no adapters {quoted(unknown)}; it holds {quoted(list(self.names))}"
            )
        slots = [0 if name is None else self.names[name] for name in names]
        if not any(slots):
            return None
        # One adapter for all rows fits any first dimension, and is looked up once.
        slots = slots[:1] if len(set(slots)) == 1 else slots
        return Rows.of(slots, device, trained=trained, dropping=dropping)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "choice"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, choice=Choice([]))
