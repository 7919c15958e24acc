"""Banks for the tests: several adapters of a model of the grid, alone and side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from checks import randomise
from models import CASES, Case
from torch import Tensor, nn

import minilora

MIXED = ("first", None, "narrow", "headless", "first")
"""An adapter for each row: one twice, one not at all, and the base."""

SHAPES = ("bert", "t5", "gpt2", "llama", "vit")


def injected(case: Case, name: str, dtype: torch.dtype) -> nn.Module:
    """Return a model with one adapter, the same values at each call: of other ranks, scales and sites."""
    model, targets = case.build(dtype), list(case.targets)
    heads = ["classifier"] if hasattr(model, "classifier") and "classifier" not in targets else []
    if name == "first":
        minilora.inject(model, targets, minilora.LoRAConfig(r=4, alpha=6), trainable=heads)
    elif name == "narrow":  # fewer sites, a smaller rank
        minilora.inject(model, targets[:1], minilora.LoRAConfig(r=1, alpha=3, rslora=True), trainable=heads)
    else:
        minilora.inject(model, targets[-1:], minilora.LoRAConfig(r=3, alpha=-2), trainable=())
    return randomise(model, seed=len(name))


@dataclass(frozen=True)
class Side:
    """A bank beside the models that carry its adapters alone."""

    case: Case
    bank: minilora.Bank
    alone: dict[str | None, nn.Module]

    @property
    def model(self) -> nn.Module:
        return self.bank.model

    @property
    def names(self) -> list[str | None]:
        """Of as many rows as the case's inputs have."""
        return list(MIXED[: len(self.case.run(self.model))])

    def mixed(self) -> Tensor:
        with self.bank.rows(self.names):
            return self.case.run(self.model)


def side_by_side(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, slots: int = 4, **more: object
) -> Side:
    """Return a bank with the three adapters, loaded from files, beside each of them on a model of its own."""
    case = CASES[name]
    alone: dict[str | None, nn.Module] = {
        adapter: injected(case, adapter, dtype) for adapter in ("first", "narrow", "headless")
    }
    files = {}
    for adapter, model in alone.items():
        files[adapter] = folder / f"{adapter}.safetensors"
        minilora.save(model, files[adapter])
    alone[None] = case.build(dtype).requires_grad_(False)
    return Side(case, minilora.Bank(case.build(dtype), files, slots=slots, **more), alone)


def sums(output: Tensor) -> Tensor:
    """Return a loss for each row, (b,), which weighs every number of its output differently."""
    flat = output.flatten(1).double()
    return (flat * torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)).sum(1).tanh()
