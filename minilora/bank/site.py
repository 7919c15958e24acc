"""`BankSite`: what the wrappers of a bank have in common; `LowRankSite`, with A and B for each slot.

    model.encoder.query: BankLinear
        .base       the layer that was there
        .lora_A     Stack (slots + 1, r, in)
        .lora_B     Stack (slots + 1, r, out): B^T

An adapter comes to a wrapper, and leaves it, as the wrapper that it would have on a model of its own: a
`LoRA`, a `TrainableHead`. So what a file means is said once, in `plan` and `files`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, LoRAConfig
from ..describing import DescribedWeight
from ..errors import MergeError
from ..layout import Layout
from ..lora import LoRA
from ..module import InjectedModule
from .directory import Directory
from .rows import Rows
from .stack import Stack


class BankSite(InjectedModule):
    """A wrapper in which each row of a batch meets the adapter of its own.

    Args:
        base: the module that was at the site.
        directory: of the bank.
    """

    mergeable = False
    trains = False

    def __init__(self, base: nn.Module, directory: Directory) -> None:
        super().__init__(base)
        self.directory = directory
        self.configs: dict[int, Config | None] = {}
        """What each adapter that stands here was built from, by its slot; None for what has no config."""

    def chosen(self) -> Rows | None:
        """Return the rows that this thread has chosen; None for the base."""
        return self.directory.choice.current() if self.enabled else None

    def put(self, slot: int, wrapper: InjectedModule | None) -> None:
        """Give a slot what a wrapper holds; None empties it. Inverse: `state`."""
        raise NotImplementedError

    def state(self, slot: int) -> dict[str, Tensor]:
        """Return what a slot holds, by the names that a file uses. Inverse: `put`."""
        raise NotImplementedError

    def remember(self, slot: int) -> Callable[[], None]:
        """Return what puts a slot back as it is now."""
        raise NotImplementedError

    def train_slot(self, slot: int) -> list[nn.Parameter]:
        """Return the parameters of a slot, which train from now on. Inverse: `settle`."""
        raise NotImplementedError

    def settle(self, slot: int) -> None:
        """Let a slot train no more. Inverse: `train_slot`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The base's weight; where rows are chosen, for its dtype, device and shape only.

        Each row has a weight of its own, so code that would compute with one, past the layer, is stopped.
        """
        weight: Tensor = getattr(self.base, "weight")  # noqa: B009  perhaps an AttributeError, as it should be
        return weight if self.chosen() is None else weight.detach().as_subclass(_RoutedWeight)

    def save_problem(self) -> str:
        """Return what to write instead of `minilora.save`."""
        return "holds the adapters of a bank; one of them is written by bank.save(name, path)"

    def merge_problem(self, dtype: torch.dtype | None = None) -> str:
        """Return why many adapters have no merged form."""
        return (
            "each adapter of a bank has a weight of its own, and a layer can be merged with one: "
            "bank.save(name, path), then minilora.eject(model), minilora.load(model, path) and merge"
        )

    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Raise, since there is no plain module that does the same.

        Raises:
            MergeError: always.
        """
        raise MergeError(self.merge_problem())

    def ejected(self) -> nn.Module:
        """Return the base as it was, and note that the bank has come apart."""
        self.directory.standing = False
        return super().ejected()


class LowRankSite(BankSite):
    """A wrapper with A and B for each slot.

    Args:
        base: the layer.
        directory: of the bank.
        layout: how the layer's weight is seen as a matrix.
        device: of A and B.
        dtype: of A and B.
    """

    kind = "lora"
    position = 2

    scaling: Tensor  # (slots + 1,), and so is
    dropout: Tensor

    def __init__(
        self,
        base: nn.Module,
        directory: Directory,
        layout: Layout,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(base, directory)
        self.layout = layout
        slots, r = directory.slots, directory.r
        self.lora_A = Stack(slots, (r, layout.inputs), device=device, dtype=dtype)
        self.lora_B = Stack(slots, (layout.outputs, r), device=device, dtype=dtype, transposed=True)
        for name in ("scaling", "dropout"):
            self.register_buffer(name, self._settings(name), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of A and B."""
        return self.lora_A.values.dtype

    def put(self, slot: int, wrapper: InjectedModule | None) -> None:
        """Give a slot the A, B and config of a `LoRA`; None empties it. Inverse: `state`."""
        assert wrapper is None or isinstance(wrapper, LoRA)
        self.lora_A.put(slot, None if wrapper is None else wrapper.lora_A)
        self.lora_B.put(slot, None if wrapper is None else wrapper.lora_B)
        self.configs.pop(slot, None)
        if wrapper is not None:
            self.configs[slot] = wrapper.config
        self._update()

    def state(self, slot: int) -> dict[str, Tensor]:
        """Return a slot's A, (r, in), and B, (out, r). Inverse: `put`."""
        A, B = self._shapes(slot)
        return {"lora_A": self.lora_A.take(slot, A), "lora_B": self.lora_B.take(slot, B)}

    def remember(self, slot: int) -> Callable[[], None]:
        """Return what puts a slot back as it is now."""
        A, B = self.lora_A.remember(slot), self.lora_B.remember(slot)
        config = self.configs.get(slot)

        def undo() -> None:
            A()
            B()
            self.configs.pop(slot, None)
            if config is not None:
                self.configs[slot] = config
            self._update()

        return undo

    def train_slot(self, slot: int) -> list[nn.Parameter]:
        """Return a slot's A and B, which train from now on. Inverse: `settle`."""
        if slot not in self.configs:
            return []
        A, B = self._shapes(slot)
        return [self.lora_A.train_slot(slot, A), self.lora_B.train_slot(slot, B)]

    def settle(self, slot: int) -> None:
        """Put a slot's A and B into the stacks. Inverse: `train_slot`."""
        self.lora_A.settle(slot)
        self.lora_B.settle(slot)

    def own_state(self) -> dict[str, Tensor]:
        """Return the stacks, and what trains; scaling and dropout follow from the configs."""
        return {name: t for name, t in super().own_state().items() if name not in ("scaling", "dropout")}

    def parameter_count(self) -> int:
        """Return how many parameters the adapters of the bank have here."""
        return sum(tensor.numel() for slot in self.configs for tensor in self.state(slot).values())

    def description(self) -> str:
        """Return the kind, the largest rank and the number of adapters."""
        return f"bank, LoRA r<={self.directory.r}, {len(self.configs)} of {self.directory.slots} slots"

    def extra_repr(self) -> str:
        """Return what `print(model)` shows beside the name."""
        return self.description()

    def _shapes(self, slot: int) -> tuple[torch.Size, torch.Size]:
        config = self.configs[slot]
        assert isinstance(config, LoRAConfig)
        A, B = (config.r, self.layout.inputs), (self.layout.outputs, config.r)
        return torch.Size(A), torch.Size(B)

    def _settings(self, name: str) -> Tensor:
        """Return the scaling, or the dropout, of each slot; in full precision, however the model was cast."""
        values = [0.0] * (self.directory.slots + 1)
        for slot, config in self.configs.items():
            values[slot] = getattr(config, name)
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.tensor(values, dtype=dtype, device="cpu").to(self.lora_A.values.device)

    @torch.no_grad()
    def _update(self) -> None:
        self.scaling.copy_(self._settings("scaling"))
        self.dropout.copy_(self._settings("dropout"))

    # torch has no public hook for what is moved and cast.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scaling, self.dropout = self._settings("scaling"), self._settings("dropout")
        return self


class _RoutedWeight(DescribedWeight):
    """The weight of a layer in which each row of the batch has its own."""

    refusal = (
        "of a layer of a bank, inside bank.rows. Each row has a weight of its own there: call the layer "
        "itself, or leave it out of the adapters"
    )
