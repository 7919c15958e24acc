"""`Rows`: which adapter each row of a batch has. `Choice`: the rows that a thread has chosen at present.

A row is an entry of a batch's first dimension. A layer may see rows × beams, or rows × tokens flattened:
what belongs to one row stands together there, so that the first dimension is a multiple of the rows.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MiniLoRAError


@dataclass(frozen=True, eq=False)
class Rows:
    """Which slot each row of a batch has; slot 0 is the base."""

    slots: Tensor
    """(b,), int64. One for all rows has b = 1."""
    may_be_base: bool
    """Whether a row is the base's, as far as can be told without reading `slots`."""
    drops: bool = False
    """Whether the adapter of a row has dropout, which acts while training."""
    listed: tuple[int, ...] | None = None
    """The slots, where they are known without waiting for the device."""
    training: tuple[int, ...] = ()
    """The slots that occur, if one of them trains; in a stack of these alone, the others get no gradient."""
    places: Tensor | None = None
    """(b,), int64: where in `training` the slot of each row stands."""

    @classmethod
    def of(
        cls,
        slots: Sequence[int] | Tensor,
        device: torch.device,
        *,
        trained: frozenset[int] = frozenset(),
        dropping: frozenset[int] = frozenset(),
    ) -> Rows:
        """Return the rows with these slots.

        Args:
            slots: (b,). What a tensor holds is read here only if an adapter trains.
            device: where the model computes.
            trained: the slots whose adapters train.
            dropping: the slots whose adapters have dropout.
        """
        listed: tuple[int, ...] | None = None
        if not isinstance(slots, Tensor):
            listed = tuple(slots)
            slots = torch.tensor(listed, dtype=torch.int64, device="cpu")
        elif trained:
            listed = tuple(slots.tolist())
        on_device = slots.to(device, torch.int64)
        if listed is None:
            return cls(on_device, may_be_base=True, drops=bool(dropping))
        present = tuple(sorted(set(listed)))
        training: tuple[int, ...] = ()
        places: Tensor | None = None
        if not trained.isdisjoint(present):
            training = present
            where = {slot: place for place, slot in enumerate(present)}
            places = torch.tensor([where[slot] for slot in listed], dtype=torch.int64, device=device)
        drops = not dropping.isdisjoint(present)
        return cls(on_device, 0 in present, drops, listed, training, places)

    def per_row(self, size: int) -> int:
        """Return how many entries of a first dimension belong to each row.

        Args:
            size: of the first dimension that a layer sees.

        Raises:
            MiniLoRAError: when they cannot be shared out evenly.
        """
        b = self.slots.shape[0]
        if size % b:
            raise MiniLoRAError(
                f"bank.rows was given {b} rows, and a layer sees a first dimension of {size}: it must be the "
                "rows, or a multiple (rows x beams, rows x tokens flattened). One name for all rows, "
                'bank.rows("name"), fits any'
            )
        return size // b

    def host(self) -> tuple[int, ...]:
        """Return the slots as numbers, which waits for the device where they came as a tensor."""
        return tuple(self.slots.tolist()) if self.listed is None else self.listed


class Choice(threading.local):
    """What a thread has chosen: two threads with two batches do not meet."""

    def __init__(self) -> None:
        # Set here and not on the class: torch.compile sees no change of what an instance does not have yet.
        self.rows: Rows | None = None
