"""Models that serve batches in which each row has one of several adapters.

base              no adapter at all
minilora merged   one adapter, the same for all rows, in the weights
minilora bank     `minilora.Bank`
PEFT              `adapter_names`
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import minilora

from .setups import Setup
from .unmeasured import NotMeasured, import_optional

BASE = "base"
BANK = "minilora bank"


class Server(abc.ABC):
    """A model in evaluation mode, with the adapters that it can serve.

    Args:
        setup: the model and the form of the adapters.
        folder: with a file or a folder for each adapter, by name.
        names: of the adapters.
    """

    model: nn.Module
    most: float = math.inf
    """How many adapters it is given."""

    @abc.abstractmethod
    def __init__(self, setup: Setup, folder: Path, names: Sequence[str]) -> None: ...

    def serving(self, rows: Sequence[str]) -> AbstractContextManager[dict[str, Any]]:
        """Return a context for calls with these rows; it gives what else the model must be called with."""
        return nullcontext({})

    def require(self, adapters: int) -> None:
        """Raise `NotMeasured` for a batch of so many adapters that it is not served."""
        if adapters > self.most:
            raise NotMeasured(f"beyond {self.most} adapters, loading them takes minutes")

    def operations(self) -> dict[str, tuple[Callable[[], object] | None, Callable[[], object]]]:
        """Return, by the operation's name, what brings it about off the clock and what is timed."""
        return {}


class Base(Server):
    """The bare model, frozen as the others are: for weights that are not, torch may choose other products."""

    def __init__(self, setup: Setup, folder: Path, names: Sequence[str]) -> None:
        self.model = setup.build().eval().requires_grad_(False)


class Merged(Server):
    """One adapter in the weights."""

    def __init__(self, setup: Setup, folder: Path, names: Sequence[str]) -> None:
        self.files = [folder / f"{name}.safetensors" for name in names[:2]]
        self.model = minilora.load(setup.build(), self.files[0]).eval()
        minilora.merge(self.model)

    def operations(self) -> dict[str, tuple[Callable[[], object] | None, Callable[[], object]]]:
        def switch() -> None:
            minilora.unmerge(self.model)
            minilora.load(self.model, self.files[-1])
            minilora.merge(self.model)

        return {"switch": (None, switch)}


class Banked(Server):
    """All adapters, in a bank."""

    def __init__(self, setup: Setup, folder: Path, names: Sequence[str]) -> None:
        self.model = setup.build().eval()
        self.files = {name: folder / f"{name}.safetensors" for name in names}
        self.bank = minilora.Bank(self.model, self.files, slots=len(names) + 1)

    @contextlib.contextmanager
    def serving(self, rows: Sequence[str]) -> Iterator[dict[str, Any]]:
        with self.bank.rows(list(rows)):
            yield {}

    def operations(self) -> dict[str, tuple[Callable[[], object] | None, Callable[[], object]]]:
        name, file = next(iter(self.files.items()))

        def load() -> None:
            self.bank.load("new", file)

        def remove() -> None:
            if "new" in self.bank:
                self.bank.remove("new")

        def bring() -> None:
            if "new" not in self.bank:
                load()

        def switch() -> None:
            with self.bank.rows(name):
                pass

        return {"load": (remove, load), "remove": (bring, remove), "switch": (None, switch)}


class Peft(Server):
    """As many adapters as PEFT is given, told by `adapter_names`."""

    most = 64

    def __init__(self, setup: Setup, folder: Path, names: Sequence[str]) -> None:
        self.package = import_optional("peft")
        self.folder, self.names = folder, names[: self.most]
        model = setup.build()
        first, *others = self.names
        self.model = self.package.PeftModel.from_pretrained(model, folder / first, adapter_name=first).eval()
        for name in others:
            self.model.load_adapter(folder / name, adapter_name=name)

    def serving(self, rows: Sequence[str]) -> AbstractContextManager[dict[str, Any]]:
        return nullcontext({"adapter_names": list(rows)})

    def operations(self) -> dict[str, tuple[Callable[[], object] | None, Callable[[], object]]]:
        model: Any = self.model
        first = self.names[0]

        def load() -> None:
            model.load_adapter(self.folder / first, adapter_name="new")

        def remove() -> None:
            if "new" in model.peft_config:
                model.delete_adapter("new")

        def bring() -> None:
            if "new" not in model.peft_config:
                load()

        def switch() -> None:
            model.set_adapter(first)

        return {"load": (remove, load), "remove": (bring, remove), "switch": (None, switch)}


SERVERS: dict[str, type[Server]] = {BASE: Base, "minilora merged": Merged, BANK: Banked, "PEFT": Peft}


def write_adapters(setup: Setup, folder: Path, names: Sequence[str]) -> None:
    """Write each adapter with random values, as a file of minilora's and, if PEFT gets it, a folder."""
    model = minilora.inject(setup.build(), setup.target_names, setup.lora_config(), trainable=())
    generator = torch.Generator().manual_seed(setup.seed)
    for place, name in enumerate(names):
        for key, tensor in minilora.adapter_state_dict(model).items():
            std = 0.1 if key.endswith("lora_B") else 1 / tensor.shape[-1] ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)
        minilora.save(model, folder / f"{name}.safetensors")
        if place < Peft.most:
            minilora.save(model, folder / name, format="peft")
