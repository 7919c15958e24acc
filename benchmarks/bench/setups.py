"""A model, where it runs and the update that it gets, and the options that say so."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import minilora

from .arguments import positive
from .models import SHAPES, Shape

TARGETS = ("qv", "all-linear")
"""Query and value projections; every linear layer of the encoder or decoder."""

PRECISIONS = ("fp32", "bf16-autocast", "bf16")
"""float32; float32 weights under bfloat16 autocast; weights stored in bfloat16, adapters in float32.

Training runs under autocast in both bfloat16 precisions, inference in the first of them only."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, where it runs, and the update that it gets."""

    model: str
    device: torch.device
    targets: str = "all-linear"
    rank: int = 8
    precision: str = "fp32"
    layers: int | None = None
    """Number of layers; None for the shape's own."""
    dropout: float = 0.0
    """On the low-rank path. The model itself has none: its random numbers would be timed."""
    seed: int = 0

    @property
    def shape(self) -> Shape:
        return SHAPES[self.model]

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def target_names(self) -> list[str]:
        return list(self.shape.targets[self.targets])

    @property
    def adapts_parameters(self) -> bool:
        """Whether the targets are parameters, and not layers."""
        return self.targets == "experts"

    @property
    def alpha(self) -> int:
        return 2 * self.rank

    def lora_config(self) -> minilora.LoRAConfig:
        return minilora.LoRAConfig(r=self.rank, alpha=self.alpha, dropout=self.dropout)

    def build(self) -> nn.Module:
        """Return the bare model with random weights, the same at each call."""
        config = copy.deepcopy(self.shape.config)
        if self.layers:
            config.num_hidden_layers = self.layers
        torch.manual_seed(self.seed)
        with self.device:
            model = self.shape.kind(config)
        return model.to(torch.bfloat16) if self.precision == "bf16" else model

    def tokens(self, batch: int, length: int) -> Tensor:
        """Return random tokens, (batch, length)."""
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = self.shape.config.vocab_size
        return torch.randint(vocabulary, (batch, length), generator=generator).to(self.device)

    def training_batch(self, batch: int, length: int) -> dict[str, Tensor]:
        """Return tokens, or images `length` pixels wide, and as labels a class for each, or the tokens."""
        classes = torch.arange(batch, device=self.device) % 2
        if self.shape.takes_images:
            generator = torch.Generator().manual_seed(self.seed)
            pixels = torch.randn(batch, 3, length, length, generator=generator).to(self.device)
            return {"pixel_values": pixels, "labels": classes}
        tokens = self.tokens(batch, length)
        return {"input_ids": tokens, "labels": classes if self.shape.head else tokens}

    def autocast(self, *, training: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context that this precision runs in; a new one for each use."""
        on = self.precision == "bf16-autocast" or (training and self.precision == "bf16")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def compile(self, model: nn.Module) -> Callable[..., Any]:
        """Compile a model; on CUDA its kernels are replayed as a CUDA graph."""
        # All contestants enter through the same code of transformers, and each counts as a recompilation of
        # it: at the usual limit of 8, those that come later would run uncompiled, with a warning at most.
        torch._dynamo.config.cache_size_limit = 256
        return torch.compile(model, mode="reduce-overhead" if self.on_cuda else None, dynamic=False)

    def begin_step(self) -> None:
        """Let the next replay of a CUDA graph overwrite what the last one returned."""
        if self.on_cuda:
            torch.compiler.cudagraph_mark_step_begin()


def target_layers(model: nn.Module, setup: Setup) -> dict[str, nn.Linear]:
    """Return the linear layers to be adapted, by name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _is_target(name, setup.target_names)
    }


def adapted_modules(model: nn.Module, setup: Setup) -> Iterator[nn.Module]:
    """Yield the modules that are targets, or have a parameter that is one, in the model's order."""
    for name, module in model.named_modules():
        names = [name, *(f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))]
        if any(_is_target(each, setup.target_names) for each in names):
            yield module


def _is_target(name: str, targets: Sequence[str]) -> bool:
    """Whether a module's name is one of the targets, or ends in one as a whole segment."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def add_model_arguments(parser: argparse.ArgumentParser, *, targets: Sequence[str]) -> None:
    """Add `--model`, and `--targets` with its default."""
    models = [name for name, shape in SHAPES.items() if set(TARGETS) <= shape.targets.keys()]
    parser.add_argument("--model", choices=models, default="bert-base", help="random weights")
    parser.add_argument(
        "--targets", choices=TARGETS, nargs="+", default=list(targets), help="one table for each"
    )


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--batch` and `--length`."""
    parser.add_argument("--batch", type=positive, default=16, help="sequences")
    parser.add_argument("--length", type=positive, default=128, help="tokens in each sequence")


def shrink(args: argparse.Namespace) -> None:
    """Put the tiny model of a quick run in the place of the one asked for, and a small batch."""
    args.model = SHAPES[args.model].quick
    if "batch" in args:
        args.batch, args.length = 2, 16


def setup_from(args: argparse.Namespace, **more: Any) -> Setup:
    """Return the setup of a command line; `more` are fields that it does not give, or gives several of."""
    return Setup(model=args.model, device=args.device, rank=args.rank, seed=args.seed, **more)
