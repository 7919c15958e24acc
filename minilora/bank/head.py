"""Heads of a bank: each row of a batch goes through the head of its own adapter.

BankLinearHead    a linear head: weight and bias for each slot, gathered by row
BankModuleHead    any other module: a copy for each slot, called on its own rows

A row whose adapter has no head here goes through the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MiniLoRAError
from ..linear import computes_plainly, linear_shape
from ..module import InjectedModule, device_of
from ..trained import TrainableHead
from .directory import Directory
from .gathered import linear_by_row
from .rows import Rows
from .site import BankSite
from .stack import Stack


class BankHead(BankSite):
    """What both kinds have in common."""

    kind = TrainableHead.kind
    trains_whole_module = True

    def signed_weight(self) -> None:
        """Return nothing: the head of a fresh base is random, and tells nothing of it."""

    def parameter_count(self) -> int:
        """Return how many parameters the adapters of the bank have here."""
        return sum(tensor.numel() for slot in self.configs for tensor in self.state(slot).values())

    def description(self) -> str:
        """Return the kind and the number of adapters."""
        kind = type(self.base).__name__
        return f"bank, trained in full ({kind}), {len(self.configs)} of {self.directory.slots} slots"


class BankLinearHead(BankHead):
    """A linear head for each slot.

    Args:
        base: the head of the base, an `nn.Linear`.
        directory: of the bank.
    """

    filled: Tensor  # (slots + 1,), bool: which adapters have a head here

    def __init__(self, base: nn.Module, directory: Directory) -> None:
        super().__init__(base, directory)
        self._parts = [name for name, _ in base.named_parameters()]
        for name, parameter in base.named_parameters():
            stack = Stack(
                directory.slots, tuple(parameter.shape), device=parameter.device, dtype=parameter.dtype
            )
            self.add_module(f"head_{name}", stack)
        filled = torch.zeros(directory.slots + 1, dtype=torch.bool, device=device_of(base))
        self.register_buffer("filled", filled)

    def forward(self, input: Tensor) -> Tensor:
        """Map (rows, ..., in) to (rows, ..., out).

        Raises:
            MiniLoRAError: when the first dimension is no multiple of the rows that were chosen.
        """
        y: Tensor = self.base(input)
        rows = self.chosen()
        return y if rows is None or not y.numel() else self._by_row(y, input, rows)

    def _by_row(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        rows.per_row(x.shape[0])
        parts = [self._stack(name).by_row(rows, x.device) for name in self._parts]
        own = linear_by_row(x, parts[0], parts[1] if len(parts) > 1 else None)
        filled = self.filled[rows.slots.to(x.device)]
        entries = (filled.shape[0], -1, y.shape[-1])
        return torch.where(filled[:, None, None], own.reshape(entries), y.reshape(entries)).view(y.shape)

    def put(self, slot: int, wrapper: InjectedModule | None) -> None:
        """Give a slot a trained head; None empties it. Inverse: `state`."""
        values = {} if wrapper is None else wrapper.saved_state()
        for name in self._parts:
            self._stack(name).put(slot, values.get(name))
        self._note(slot, there=wrapper is not None)

    def state(self, slot: int) -> dict[str, Tensor]:
        """Return the tensors of a slot's head. Inverse: `put`."""
        stacks = {name: self._stack(name) for name in self._parts}
        return {name: stack.take(slot, stack.values.shape[1:]) for name, stack in stacks.items()}

    def remember(self, slot: int) -> Callable[[], None]:
        """Return what puts a slot back as it is now."""
        parts = [self._stack(name).remember(slot) for name in self._parts]
        there = slot in self.configs

        def undo() -> None:
            for part in parts:
                part()
            self._note(slot, there=there)

        return undo

    def train_slot(self, slot: int) -> list[nn.Parameter]:
        """Return the parameters of a slot's head, which train from now on. Inverse: `settle`."""
        if slot not in self.configs:
            return []
        stacks = [self._stack(name) for name in self._parts]
        return [stack.train_slot(slot, stack.values.shape[1:]) for stack in stacks]

    def settle(self, slot: int) -> None:
        """Put a slot's head into the stacks. Inverse: `train_slot`."""
        for name in self._parts:
            self._stack(name).settle(slot)

    def _stack(self, name: str) -> Stack:
        stack = getattr(self, f"head_{name}")
        assert isinstance(stack, Stack)
        return stack

    def _note(self, slot: int, *, there: bool) -> None:
        self.filled[slot] = there
        self.configs.pop(slot, None)
        if there:
            self.configs[slot] = None


class BankModuleHead(BankHead):
    """A copy of a module for each slot, called on the rows of that slot.

    Args:
        base: the module of the base; its first argument and what it returns are tensors, of rows first.
        directory: of the bank.
    """

    def __init__(self, base: nn.Module, directory: Directory) -> None:
        super().__init__(base, directory)
        self.heads = nn.ModuleDict()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the head of each adapter on its rows, and put what they return together.

        Raises:
            MiniLoRAError: when the first dimension is no multiple of the rows that were chosen, or a head
                does not return one tensor of its rows.
        """
        rows = self.chosen()
        if rows is None:
            return self.base(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        size = x.shape[0]
        each = rows.per_row(size)
        modules = [self._of(slot) for slot in rows.host() for _ in range(each)]
        if all(module is modules[0] for module in modules):
            return modules[0](*args, **kwargs)

        order: list[int] = []
        outputs: list[Tensor] = []
        for module in dict.fromkeys(modules):
            own = [i for i, other in enumerate(modules) if other is module]
            index = torch.tensor(own, device=x.device)
            outputs.append(module(*(_taken(a, index, size) for a in args),
                                  **{key: _taken(a, index, size) for key, a in kwargs.items()}))  # fmt: skip
            order += own
        if not all(isinstance(output, Tensor) for output in outputs):
            kind = type(self.base).__name__
            raise MiniLoRAError(f"a head of a bank must return one tensor, and {kind} returns something else")
        inverse = torch.tensor(order, device=x.device).argsort()
        return torch.cat(outputs)[inverse]

    def put(self, slot: int, wrapper: InjectedModule | None) -> None:
        """Give a slot a trained head; None empties it. Inverse: `state`."""
        if str(slot) in self.heads:
            del self.heads[str(slot)]
        self.configs.pop(slot, None)
        if wrapper is not None:
            assert isinstance(wrapper, TrainableHead)
            head = copy.deepcopy(wrapper.trained).to(device_of(self.base)).requires_grad_(False)
            self.heads[str(slot)] = head.train(self.training)
            self.configs[slot] = None

    def state(self, slot: int) -> dict[str, Tensor]:
        """Return the tensors of a slot's head. Inverse: `put`."""
        state: dict[str, object] = self.heads[str(slot)].state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def remember(self, slot: int) -> Callable[[], None]:
        """Return what puts a slot back as it is now."""
        head = self.heads[str(slot)] if slot in self.configs else None

        def undo() -> None:
            self.put(slot, None)
            if head is not None:
                self.heads[str(slot)] = head
                self.configs[slot] = None

        return undo

    def train_slot(self, slot: int) -> list[nn.Parameter]:
        """Return the parameters of a slot's head, which train from now on. Inverse: `settle`."""
        if slot not in self.configs:
            return []
        parameters = [p for p in self.heads[str(slot)].parameters() if p.is_floating_point()]
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def settle(self, slot: int) -> None:
        """Let a slot's head train no more. Inverse: `train_slot`."""
        if slot in self.configs:
            self.heads[str(slot)].requires_grad_(False)

    def _of(self, slot: int) -> nn.Module:
        return self.heads[str(slot)] if slot in self.configs else self.base


def is_gathered(head: nn.Module) -> bool:
    """Return whether a head is a plain linear layer, whose weight and bias can be gathered by row."""
    shape = linear_shape(head)
    return shape is not None and not shape.transposed and computes_plainly(head) and type(head) is nn.Linear


def _taken(value: Any, index: Tensor, size: int) -> Any:
    """Return the rows of a tensor that has all of them; anything else as it is."""
    rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
    return value[index] if rows else value
