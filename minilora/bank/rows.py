"""`Rows`: which adapter each row of a batch has. `Choice`: the rows that a thread has chosen at present.

A row is an entry of a batch's first dimension. A layer may see rows × beams, or rows × tokens flattened:
what belongs to one row stands together there, so that the first dimension is a multiple of the rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import MiniLoRAError
from ..torch_internals import in_backward, is_compiling


@dataclass(eq=False)  # frozen, torch 2.6 would compile a model anew for every content of `listed`
class Rows:
    """Which slot each row of a batch has; slot 0 is the base. Nothing in it is ever changed."""

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

    def only(self) -> int | None:
        """Return the one slot of all rows, if it is known and drops nothing; None while compiling."""
        if is_compiling() or self.drops or self.listed is None or len(self.listed) > 1:
            return None
        return self.listed[0]

    def of_base(self, slots: Tensor) -> Tensor | None:
        """Return which of some slots are the base's, (b,), bool; None where none is.

        While compiling there is one answer, and so one graph, for any rows.
        """
        return slots == 0 if is_compiling() or self.may_be_base else None

    def host(self) -> tuple[int, ...]:
        """Return the slots as numbers, which waits for the device where they came as a tensor."""
        return tuple(self.slots.tolist()) if self.listed is None else self.listed


class Choice(threading.local):
    """What a thread has chosen: two threads with two batches do not meet.

    Args:
        open: the rows of all `bank.rows` blocks that threads are in, for those in which torch computes
            gradients, and with them, of a checkpoint, a forward again.
    """

    def __init__(self, open: list[Rows]) -> None:
        self.open = open
        # Set here and not on the class: torch.compile sees no change of what an instance does not have yet.
        self.rows: Rows | None = None

    def current(self) -> Rows | None:
        """Return the rows that a forward pass in this thread is about; None for the base.

        Raises:
            MiniLoRAError: when a checkpoint computes a forward again in a thread of torch's own, and several
                batches are under way, so that it cannot be told which it belongs to.
        """
        if self.rows is not None or not in_backward() or not self.open:
            return self.rows
        if len(self.open) > 1:
            raise MiniLoRAError(
                f"a checkpoint is computed again while {len(self.open)} blocks of bank.rows are open, and "
                "cannot tell whose it is: train in one thread at a time"
            )
        return self.open[0]

    @contextlib.contextmanager
    def to(self, rows: Rows | None) -> Iterator[None]:
        """Within the block, this thread has chosen these rows."""
        before, self.rows = self.rows, rows
        if rows is not None:
            self.open.append(rows)
        try:
            yield
        finally:
            self.rows = before
            if rows is not None:
                self.open.remove(rows)
