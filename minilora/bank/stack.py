"""`Stack`: a tensor for each slot of a bank, one behind the other.

    values    (slots + 1, ...)    what does not train; slot 0, the base's, is zero
    trained   "3" -> (...)        what trains, as a parameter of its own

What an adapter's numbers are stands in one place at any time: while it trains, in its parameters, and in
the stack otherwise. So an optimizer sees one adapter and no other, and the stack serves any rows in one
look-up. A smaller rank is filled up with zeros, whose products and gradients are zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rows import Rows


class Stack(nn.Module):
    """A tensor for each slot.

    Args:
        slots: how many adapters there is room for.
        shape: of a slot's tensor.
        device: of the values.
        dtype: of the values.
        transposed: store matrices with their last dimension first, where products are quicker so.
    """

    values: Tensor  # (slots + 1, ...)

    def __init__(
        self,
        slots: int,
        shape: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        stored = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
        self.register_buffer("values", torch.zeros(slots + 1, *stored, device=device, dtype=dtype))
        self.trained = nn.ParameterDict()

    def source(self, rows: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tensors one behind the other, (n, ...), and which of them each row has, (b,).

        Where an adapter of the batch trains, it is a stack of those that occur, and of no other: what is
        absent gets no gradient, not even zero, so that no optimizer touches it.
        """
        if rows.places is not None:
            present = torch.stack([self._filled_up(slot) for slot in rows.training])
            return present, rows.places.to(device)
        return self.values, rows.slots.to(device)

    def by_row(self, rows: Rows, device: torch.device) -> Tensor:
        """Return the tensor of each row, (b, ...), as it is stored."""
        values, index = self.source(rows, device)
        return values.index_select(0, index)  # several times as fast as values[index]

    @torch.no_grad()
    def put(self, slot: int, value: Tensor | None) -> None:
        """Set a slot, which no longer trains, to a value of its shape or smaller; None empties it."""
        target = self._of(slot)
        if str(slot) in self.trained:
            del self.trained[str(slot)]
        if value is None:
            target.zero_()
        elif value.shape == target.shape:
            target.copy_(value)
        else:
            target.zero_()
            _corner(target, value.shape).copy_(value)

    def remember(self, slot: int) -> Callable[[], None]:
        """Return what puts a slot back as it is now."""
        value, parameter = self._of(slot).clone(), self.trained.get(str(slot), None)

        def undo() -> None:
            self.put(slot, value)
            if parameter is not None:
                self.trained[str(slot)] = parameter

        return undo

    def take(self, slot: int, shape: torch.Size) -> Tensor:
        """Return what a slot holds: its parameter, or the corner of its tensor that has values."""
        key = str(slot)
        return self.trained[key] if key in self.trained else _corner(self._of(slot), shape)

    def train_slot(self, slot: int, shape: torch.Size) -> nn.Parameter:
        """Return what a slot holds as a parameter, which trains from now on. Inverse: `settle`."""
        if str(slot) not in self.trained:
            value = _corner(self._of(slot), shape).detach().clone(memory_format=torch.contiguous_format)
            self.trained[str(slot)] = nn.Parameter(value)
        parameter: nn.Parameter = self.trained[str(slot)]
        return parameter

    def settle(self, slot: int) -> None:
        """Put the values of a slot's parameter into the stack. Inverse: `train_slot`."""
        if str(slot) in self.trained:
            self.put(slot, self.trained[str(slot)].detach())

    def _of(self, slot: int) -> Tensor:
        """Return a slot's tensor, a view, in the shape that it has outside."""
        return self.values[slot].mT if self.transposed else self.values[slot]

    def _filled_up(self, slot: int) -> Tensor:
        if str(slot) not in self.trained:
            return self.values[slot]
        value: Tensor = self.trained[str(slot)]
        value = value.mT if self.transposed else value
        full = self.values.shape[1:]
        missing = [whole - own for own, whole in zip(value.shape, full, strict=True)]
        if not any(missing):
            return value
        return F.pad(value, [n for size in reversed(missing) for n in (0, size)])


def _corner(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the part of a tensor that begins where it begins and has a smaller shape."""
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, size)
    return tensor
