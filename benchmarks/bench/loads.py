"""What a training step works on, and how a sweep changes it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .setups import Setup, setup_from, shrink


@dataclass(frozen=True, kw_only=True)
class Load:
    """A setup and the batch that it trains on."""

    setup: Setup
    batch: int
    length: int
    compiled: bool = False
    sentences: Sequence[dict[str, Tensor]] = ()
    """Batches to take in turn, in the place of one of random tokens."""

    @property
    def title(self) -> str:
        setup = self.setup
        layers = setup.layers or getattr(setup.shape.config, "num_hidden_layers", None)
        depth = f"{layers} layers, " if layers else ""
        what = "sentences" if self.sentences else self.length
        dropout = f"dropout {setup.dropout}, " if setup.dropout else ""
        return (
            f"{setup.model}, {depth}batch {self.batch} x {what}, {setup.targets}, "
            f"r = {setup.rank}, {dropout}{setup.precision}{', torch.compile' if self.compiled else ''}"
        )

    def batches(self) -> Sequence[dict[str, Tensor]]:
        """Return what to train on, one step after the other, on the setup's device."""
        if not self.sentences:
            return [self.setup.training_batch(self.batch, self.length)]
        device = self.setup.device
        return [{name: value.to(device) for name, value in batch.items()} for batch in self.sentences]

    def swept(self, axis: str, value: int) -> Load:
        """Return this load with one quantity, a key of `AXES`, changed."""
        if axis == "tokens":
            length = min(value, self.length)
            return dataclasses.replace(self, batch=value // length, length=length)
        if axis == "length":  # the number of tokens stays
            return dataclasses.replace(self, batch=max(1, self.batch * self.length // value), length=value)
        return dataclasses.replace(self, setup=dataclasses.replace(self.setup, **{axis: value}))


@dataclass(frozen=True)
class Axis:
    """What a sweep changes."""

    label: str
    points: tuple[int, ...]
    quick_points: tuple[int, ...]


AXES = {
    "tokens": Axis("tokens per step", (1, 4, 16, 64, 256, 1024, 4096, 16384), (1, 32)),
    "rank": Axis("rank", (1, 2, 4, 8, 16, 32, 64), (1, 4)),
    "layers": Axis("layers", (2, 4, 8, 12, 24), (1, 2)),
    "length": Axis("tokens per sequence", (32, 64, 128, 256, 512), (8, 16)),
}


KINDS = {
    "convolutions": ("resnet-18", 8, 128),
    "embedding": ("minilm", 16, 64),
    "experts": ("qwen-moe", 4, 64),
}
"""What is adapted and not linear: in which model, on how many sequences or images of what length."""


def load_of(kind: str, precision: str, args: argparse.Namespace) -> Load:
    """Return the load of a key of `KINDS`, in a quick run a tiny one."""
    own = argparse.Namespace(**vars(args))
    own.model, own.batch, own.length = KINDS[kind]
    if own.quick:
        shrink(own)
    setup = setup_from(own, targets=kind, precision=precision)
    return Load(setup=setup, batch=own.batch, length=own.length)
